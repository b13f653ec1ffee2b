"""The source's job: its edges are those of the chart, and no order of events breaks an invariant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.job_runner import PERFORMED
from vmferry.model.migration import Outcome, Phase

EVENTS: tuple[m.Event, ...] = (
    m.JobStarted(),
    m.DestinationPrepared(),
    m.HandedOver(),
    m.Started(1),
    m.StartUnanswered("no answer"),
    *(m.OutcomeReceived(outcome, "why") for outcome in Outcome),
    m.DestinationReported(""),
    m.DestinationReported("link down"),
    m.DestinationSilent("gone"),
    m.DestinationCompleted(),
    m.DestinationDied("oom"),
    m.SourceReleased(),
    m.CancelRequested(),
    m.Failed(Reason.VMM_REFUSED, "no"),
    m.Restored(),
    m.RestoreFailed(Reason.VMM_GONE, "died"),
)
EDGE = re.compile(r"^    (\w+)\s+-> (\w+)\s+(\w+)$", re.MULTILINE)


KINDS = ((), ("begin",), ("begin", "commit"), ("begin", "commit", "aborted"), ("begin", "commit", "settled"))


def transitions() -> Iterator[tuple[m.State, m.Event, m.Transition]]:
    for state, event in product(m.State, EVENTS):
        with suppress(m.IllegalEventError):
            yield state, event, m.transition(state, event)


def edges() -> set[tuple[str, str, str]]:
    return {(state.value, step.state.value, type(event).__name__) for state, event, step in transitions()}


def steps() -> list[m.Transition]:
    """Every step that a job can take, after a restart too."""
    found = [step for _, _, step in transitions()]
    found += [step for phase, kinds in product(Phase, KINDS) if (step := m.recovered(phase, kinds)) is not None]
    return found


def test_the_runner_performs_every_command_of_every_step() -> None:
    for step in steps():
        assert all(isinstance(command, PERFORMED[step.state]) for command in step.commands), step


def test_every_command_comes_from_some_step() -> None:
    assert {type(command) for step in steps() for command in step.commands} == set(get_args(m.Command))


def test_the_chart_is_the_code() -> None:
    assert m.__doc__ is not None
    chart = EDGE.findall(m.__doc__)
    assert len(chart) == len(set(chart)) > 30
    # A silent destination does not heal a pause: the chart has DestinationSilent from each state to itself.
    assert set(chart) == edges()


def test_an_illegal_event_names_the_actual_and_the_required_state() -> None:
    with pytest.raises(m.IllegalEventError, match="HandedOver in state QUEUED; it needs SWITCHOVER"):
        m.transition(m.State.QUEUED, m.HandedOver())


@pytest.mark.parametrize("state", [m.State.COMMITTED, m.State.UNDECIDED, m.State.POSTCOPY, m.State.COMPLETED])
def test_cancel_after_the_commit_is_past_no_return(state: m.State) -> None:
    with pytest.raises(m.IllegalEventError) as caught:
        m.transition(state, m.CancelRequested())
    assert caught.value.reason is Reason.PAST_NO_RETURN


def test_the_order_of_the_switchover() -> None:
    step = m.transition(m.State.PREPARING, m.DestinationPrepared())
    assert step.commands == (
        m.ReserveJournal(),
        m.AppendJournal(m.JournalKind.BEGIN),
        m.HandOver(),
    )
    assert m.transition(m.State.SWITCHOVER, m.HandedOver()).commands == (m.RequestStart(),)


def test_a_commit_is_revoked_before_the_vm_runs() -> None:
    for event in (m.CancelRequested(), m.Failed(Reason.STORE_FAILED, "disk full")):
        commands = m.transition(m.State.SWITCHOVER, event).commands
        assert commands[:2] == (m.RevokeCommit(), m.ResumeVcpus())
        assert m.AppendJournal(m.JournalKind.ABORTED) in commands


def test_a_journal_that_lost_the_migration_settles_nothing() -> None:
    step = m.transition(m.State.UNDECIDED, m.OutcomeReceived(Outcome.UNKNOWN))
    assert step.state is m.State.UNDECIDED
    assert m.ResumeVcpus() not in step.commands
    assert "journal" in step.reason


def test_a_destination_that_has_not_started_is_asked_again() -> None:
    step = m.transition(m.State.UNDECIDED, m.OutcomeReceived(Outcome.PREPARED))
    assert (step.state, step.commands) == (m.State.UNDECIDED, (m.RequestStart(),))


@given(st.lists(st.sampled_from(EVENTS), max_size=60))
def test_no_order_of_events_resumes_after_the_commit_unless_refused(events: list[m.Event]) -> None:
    state, committed, refused, ended = m.State.QUEUED, False, False, False
    for event in events:
        try:
            step = m.transition(state, event)
        except m.IllegalEventError:
            continue
        assert not ended, f"{event} moved a job that had ended"
        committed = committed or step.state is m.State.COMMITTED
        refused = refused or event == m.OutcomeReceived(Outcome.REFUSED, "why")
        resumes = m.ResumeVcpus() in step.commands
        assert not resumes or not committed or refused
        assert not (m.RequestStart() in step.commands and not committed)
        assert not (m.AbandonVmm() in step.commands and not isinstance(event, m.DestinationCompleted))
        state, ended = step.state, step.state in m.ENDED


@pytest.mark.parametrize(
    ("phase", "kinds", "state", "resumes"),
    [
        (Phase.PREPARING, [], m.State.FAILING, False),
        (Phase.SWITCHOVER, ["begin"], m.State.FAILING, True),
        (Phase.SWITCHOVER, ["begin", "commit"], m.State.COMMITTED, False),
        (Phase.SWITCHOVER, ["begin", "commit", "aborted"], m.State.FAILING, True),
        (Phase.UNDECIDED, ["begin", "commit"], m.State.COMMITTED, False),
        (Phase.UNDECIDED, ["begin", "commit", "settled"], m.State.FAILING, True),
        (Phase.POSTCOPY, ["begin", "commit"], m.State.POSTCOPY, False),
        (Phase.POSTCOPY_PAUSED, ["begin", "commit"], m.State.POSTCOPY_PAUSED, False),
    ],
)
def test_the_state_in_which_a_restart_continues(phase: Phase, kinds: list[str], state: m.State, resumes: bool) -> None:
    step = m.recovered(phase, kinds)
    assert step is not None
    assert step.state is state
    assert (m.ResumeVcpus() in step.commands) is resumes


@pytest.mark.parametrize("phase", [Phase.COMPLETED, Phase.CANCELLED, Phase.FAILED, Phase.LOST])
def test_an_ended_state_stays(phase: Phase) -> None:
    assert m.recovered(phase, ["begin", "commit"]) is None


def test_every_state_is_shown_as_a_phase() -> None:
    for state, before in product(m.State, Phase):
        assert m.visible_phase(state, before) in Phase
