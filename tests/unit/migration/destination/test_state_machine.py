"""The destination: `running` and `refused` exclude each other, and repeats are answered as done."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason, VmferryError
from vmferry.migration.destination import state_machine as inc
from vmferry.model.journal import JournalKind
from vmferry.model.migration import Outcome

REQUESTS: tuple[inc.Request, ...] = (
    inc.PrepareRequested(),
    inc.ReadyRequested(),
    inc.StartRequested(),
    inc.RefuseRequested(),
    inc.AllArrived(),
)
EDGE = re.compile(r"^    (\w+)\s+-> (\w+)\s+(\w+)$", re.MULTILINE)


def test_the_chart_is_the_code() -> None:
    found = set()
    for outcome, request in product(Outcome, REQUESTS):
        try:
            found.add((outcome.value, inc.answer(outcome, request, "m1").outcome.value, type(request).__name__))
        except VmferryError:
            continue
    assert inc.__doc__ is not None
    assert set(EDGE.findall(inc.__doc__)) == found


def test_running_is_durable_before_a_vcpu_runs() -> None:
    commands = inc.answer(Outcome.PREPARED, inc.StartRequested(), "m1").commands
    running = commands.index(inc.AppendJournal(JournalKind.RUNNING))
    assert commands.index(inc.CheckVmm()) < running < commands.index(inc.StartVcpus())


def test_a_vmm_that_holds_the_state_is_ready() -> None:
    """It is what a Start looks at, which may come though the answer to Ready never did."""
    *others, last = inc.answer(Outcome.PREPARED, inc.ReadyRequested(), "m1").commands
    assert last == inc.LoadState()
    assert {inc.TakeLedger(), inc.CheckPager()} == set(others)


@pytest.mark.parametrize("outcome", [Outcome.RUNNING, Outcome.COMPLETED])
def test_refuse_after_running(outcome: Outcome) -> None:
    with pytest.raises(VmferryError) as caught:
        inc.answer(outcome, inc.RefuseRequested(), "m1")
    assert caught.value.reason is Reason.MIGRATION_RUNNING


@pytest.mark.parametrize("request_", [inc.PrepareRequested(), inc.ReadyRequested(), inc.StartRequested()])
def test_nothing_after_refused(request_: inc.Request) -> None:
    with pytest.raises(VmferryError) as caught:
        inc.answer(Outcome.REFUSED, request_, "m1")
    assert caught.value.reason is Reason.MIGRATION_REFUSED


def test_a_refusal_of_the_unknown_is_journalled() -> None:
    assert inc.AppendJournal(JournalKind.REFUSED) in inc.answer(Outcome.UNKNOWN, inc.RefuseRequested(), "m1").commands


@given(st.lists(st.sampled_from(REQUESTS), max_size=40))
def test_never_both_running_and_refused(requests: list[inc.Request]) -> None:
    journal: list[str] = []
    for request in requests:
        try:
            found = inc.answer(inc.outcome_of(journal), request, "m1")
        except VmferryError:
            continue
        journal += [command.kind.value for command in found.commands if isinstance(command, inc.AppendJournal)]
        assert inc.outcome_of(journal) is found.outcome
        if inc.StartVcpus() in found.commands:
            assert "running" in journal
    assert not {"running", "refused"} <= set(journal)
    assert len(journal) == len(set(journal))
