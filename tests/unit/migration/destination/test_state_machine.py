"""The destination: `running` and `refused` exclude each other, and repeats are answered as done."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason, VmferryError
from vmferry.migration.destination import state_machine as inc
from vmferry.model.journal import JournalKind
from vmferry.model.migration import Outcome

EVENTS: tuple[inc.Event, ...] = (
    inc.PrepareRequested(),
    inc.ReadyRequested(),
    inc.StartRequested(),
    inc.RefuseRequested(),
    inc.AllArrived(),
    inc.VmDied(),
)
EDGE = re.compile(r"^    (\w+)\s+-> (\w+)\s+(\w+)$", re.MULTILINE)


def test_the_chart_is_the_code() -> None:
    found = set()
    for state, event in product(inc.State, EVENTS):
        try:
            found.add((state.value, inc.answer(state, event, "m1").state.value, type(event).__name__))
        except VmferryError:
            continue
    assert inc.__doc__ is not None
    assert set(EDGE.findall(inc.__doc__)) == found


def test_running_is_durable_before_a_vcpu_runs() -> None:
    commands = inc.answer(inc.State.PREPARED, inc.StartRequested(), "m1").commands
    running = commands.index(inc.AppendJournal(JournalKind.RUNNING))
    assert commands.index(inc.CheckVmm()) < running < commands.index(inc.StartVcpus())


def test_a_vmm_that_holds_the_state_is_ready() -> None:
    """Start checks for the state. It may come although the answer to Ready was lost."""
    *others, last = inc.answer(inc.State.PREPARED, inc.ReadyRequested(), "m1").commands
    assert last == inc.LoadState()
    assert {inc.TakeLedger(), inc.CheckPager()} == set(others)


@pytest.mark.parametrize("state", [inc.State.RUNNING, inc.State.COMPLETED, inc.State.LOST])
def test_refuse_after_running(state: inc.State) -> None:
    with pytest.raises(VmferryError) as caught:
        inc.answer(state, inc.RefuseRequested(), "m1")
    assert caught.value.reason is Reason.MIGRATION_RUNNING


@pytest.mark.parametrize("request_", [inc.PrepareRequested(), inc.ReadyRequested(), inc.StartRequested()])
def test_nothing_after_refused(request_: inc.Event) -> None:
    with pytest.raises(VmferryError) as caught:
        inc.answer(inc.State.REFUSED, request_, "m1")
    assert caught.value.reason is Reason.MIGRATION_REFUSED


def test_a_refusal_of_the_unknown_is_journalled() -> None:
    assert inc.AppendJournal(JournalKind.REFUSED) in inc.answer(inc.State.UNKNOWN, inc.RefuseRequested(), "m1").commands


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_never_both_running_and_refused(requests: list[inc.Event]) -> None:
    journal: list[str] = []
    for request in requests:
        try:
            found = inc.answer(inc.state_of(journal), request, "m1")
        except VmferryError:
            continue
        journal += [command.kind.value for command in found.commands if isinstance(command, inc.AppendJournal)]
        assert inc.state_of(journal) is found.state
        if inc.StartVcpus() in found.commands:
            assert "running" in journal
    assert not {"running", "refused"} <= set(journal)
    assert not {"completed", "lost"} <= set(journal)
    assert len(journal) == len(set(journal))


def test_every_command_comes_from_some_answer() -> None:
    found: set[type[inc.Command]] = set()
    for state, event in product(inc.State, EVENTS):
        with suppress(VmferryError):
            found |= {type(command) for command in inc.answer(state, event, "m1").commands}
    assert found == set(get_args(inc.Command))


def test_the_guard_is_durable_before_completed() -> None:
    """A restarted daemon keeps a pager that guards pages, and lets any other go."""
    commands = inc.answer(inc.State.RUNNING, inc.AllArrived(), "m1").commands
    assert commands.index(inc.SaveGuard()) < commands.index(inc.AppendJournal(JournalKind.COMPLETED))


def test_a_vm_that_died_is_lost_only_where_it_ran() -> None:
    after = {state: inc.answer(state, inc.VmDied(), "m1").state for state in inc.State}
    assert after[inc.State.PREPARED] is inc.State.REFUSED
    assert [state for state, then in after.items() if then is inc.State.LOST] == [inc.State.RUNNING, inc.State.LOST]
    assert after[inc.State.COMPLETED] is inc.State.COMPLETED


@pytest.mark.parametrize("state", inc.State)
def test_every_state_has_an_outcome(state: inc.State) -> None:
    assert inc.outcome_of(state) is (Outcome.RUNNING if state is inc.State.LOST else Outcome[state.name])
