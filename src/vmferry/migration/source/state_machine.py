"""The source's job as a state machine: pure, (state, event) → (state, commands).

Edges (a test compares them with the code):

    QUEUED          -> PREPARING        JobStarted
    QUEUED          -> CANCELLED        CancelRequested
    QUEUED          -> FAILED           Failed
    PREPARING       -> SWITCHOVER       DestinationPrepared
    PREPARING       -> CANCELLING       CancelRequested
    PREPARING       -> FAILING          Failed
    SWITCHOVER      -> COMMITTED        HandedOver
    SWITCHOVER      -> CANCELLING       CancelRequested
    SWITCHOVER      -> FAILING          Failed
    COMMITTED       -> POSTCOPY         Started
    COMMITTED       -> UNDECIDED        StartUnanswered
    COMMITTED       -> POSTCOPY         OutcomeReceived
    COMMITTED       -> UNDECIDED        OutcomeReceived
    COMMITTED       -> FAILING          OutcomeReceived
    UNDECIDED       -> POSTCOPY         Started
    UNDECIDED       -> UNDECIDED        StartUnanswered
    UNDECIDED       -> POSTCOPY         OutcomeReceived
    UNDECIDED       -> UNDECIDED        OutcomeReceived
    UNDECIDED       -> FAILING          OutcomeReceived
    POSTCOPY        -> POSTCOPY         DestinationReported
    POSTCOPY        -> POSTCOPY_PAUSED  DestinationReported
    POSTCOPY        -> POSTCOPY         DestinationSilent
    POSTCOPY        -> COMPLETING       DestinationCompleted
    POSTCOPY        -> LOST             DestinationDied
    POSTCOPY_PAUSED -> POSTCOPY         DestinationReported
    POSTCOPY_PAUSED -> POSTCOPY_PAUSED  DestinationReported
    POSTCOPY_PAUSED -> POSTCOPY_PAUSED  DestinationSilent
    POSTCOPY_PAUSED -> COMPLETING       DestinationCompleted
    POSTCOPY_PAUSED -> LOST             DestinationDied
    COMPLETING      -> COMPLETED        SourceReleased
    CANCELLING      -> CANCELLING       CancelRequested
    CANCELLING      -> CANCELLED        Restored
    CANCELLING      -> FAILED           RestoreFailed
    FAILING         -> FAILING          CancelRequested
    FAILING         -> FAILED           Restored
    FAILING         -> FAILED           RestoreFailed

The runner performs the commands of a transition in order. UNDECIDED without a command asks the destination for its
outcome. POSTCOPY and POSTCOPY_PAUSED have no commands: the runner watches the destination.

The API does not show four of the states. COMMITTED, shown as SWITCHOVER, is the point of no return: the commit is
durable, and the first Start is sent. From there the VM returns to the source only if the destination has journalled
`refused`. COMPLETING is shown as POSTCOPY. CANCELLING and FAILING are shown as the phase before, until the VM is back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from vmferry.errors import Reason, VmferryError
from vmferry.migration.source.commands import (
    PREPARE,
    RELEASE,
    SWITCH,
    TAKE_BACK,
    UNDO_PREPARE,
    UNDO_SWITCH,
    AbandonVmm,
    AppendJournal,
    AttachMemory,
    Command,
    HandOver,
    MarkPoison,
    RemovePager,
    RequestPrepare,
    RequestRefuse,
    RequestStart,
    ReserveJournal,
    ResumeVcpus,
    RevokeCommit,
    SendFinish,
    SendHello,
    ServePages,
    StartPager,
    ThawPager,
)
from vmferry.migration.source.events import (
    CancelRequested,
    DestinationCompleted,
    DestinationDied,
    DestinationPrepared,
    DestinationReported,
    DestinationSilent,
    Event,
    Failed,
    HandedOver,
    JobStarted,
    OutcomeReceived,
    Restored,
    RestoreFailed,
    SourceReleased,
    Started,
    StartUnanswered,
)
from vmferry.model.journal import JournalKind
from vmferry.model.migration import Outcome, Phase

__all__ = [
    "CANCELLABLE",
    "ENDED",
    "RESTORING",
    "AbandonVmm",
    "AppendJournal",
    "AttachMemory",
    "CancelRequested",
    "Command",
    "DestinationCompleted",
    "DestinationDied",
    "DestinationPrepared",
    "DestinationReported",
    "DestinationSilent",
    "Event",
    "Failed",
    "HandOver",
    "HandedOver",
    "IllegalEventError",
    "JobStarted",
    "JournalKind",
    "MarkPoison",
    "OutcomeReceived",
    "RemovePager",
    "RequestPrepare",
    "RequestRefuse",
    "RequestStart",
    "ReserveJournal",
    "RestoreFailed",
    "Restored",
    "ResumeVcpus",
    "RevokeCommit",
    "SendFinish",
    "SendHello",
    "ServePages",
    "SourceReleased",
    "StartPager",
    "StartUnanswered",
    "Started",
    "State",
    "ThawPager",
    "Transition",
    "recovered",
    "transition",
    "visible_phase",
]
"""All names of a job on its source. Its values live in three modules; other modules read them through this one."""


class State(StrEnum):
    """The state of the job. It is finer than `Phase`, see the module's docstring."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    SWITCHOVER = "SWITCHOVER"
    COMMITTED = "COMMITTED"
    UNDECIDED = "UNDECIDED"
    POSTCOPY = "POSTCOPY"
    POSTCOPY_PAUSED = "POSTCOPY_PAUSED"
    COMPLETING = "COMPLETING"
    CANCELLING = "CANCELLING"
    FAILING = "FAILING"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    LOST = "LOST"


CANCELLABLE: frozenset[State] = frozenset({State.QUEUED, State.PREPARING, State.SWITCHOVER})
ENDED: frozenset[State] = frozenset({State.COMPLETED, State.CANCELLED, State.FAILED, State.LOST})
RESTORING: frozenset[State] = frozenset({State.CANCELLING, State.FAILING})


def visible_phase(state: State, before: Phase) -> Phase:
    """The phase that the API shows in `state`, when it showed `before`."""
    match state:
        case State.COMMITTED:
            return Phase.SWITCHOVER
        case State.COMPLETING | State.CANCELLING | State.FAILING:
            return before
        case _:
            return Phase(state.value)


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state, its reason, and its commands in order."""

    state: State
    commands: tuple[Command, ...] = ()
    code: Reason | None = None
    reason: str = ""


class IllegalEventError(VmferryError):
    """An event that the state does not admit."""

    def __init__(self, state: State, event: Event, required: Collection[State]) -> None:
        names = ", ".join(sorted(required)) or "none"
        if isinstance(event, CancelRequested):
            super().__init__(
                Reason.PAST_NO_RETURN,
                f"the migration is {state}; it can be cancelled only before its commit ({names})",
                "It has ended: there is nothing to cancel."
                if state in ENDED
                else "The VM belongs to the destination now; migrate it back once the migration has ended.",
            )
        else:
            super().__init__(Reason.INTERNAL, f"{type(event).__name__} in state {state}; it needs {names}")
        self.state = state
        self.event = event


def transition(state: State, event: Event) -> Transition:
    """The next state and its commands.

    Raises: IllegalEventError for an event that `state` does not admit.
    """
    match state:
        case State.QUEUED | State.PREPARING | State.SWITCHOVER:
            found = _before_commit(state, event)
        case State.COMMITTED | State.UNDECIDED:
            found = _after_commit(event)
        case State.POSTCOPY | State.POSTCOPY_PAUSED:
            found = _postcopy(state, event)
        case State.COMPLETING:
            found = Transition(State.COMPLETED) if isinstance(event, SourceReleased) else None
        case State.CANCELLING | State.FAILING:
            found = _restoring(state, event)
        case State.COMPLETED | State.CANCELLED | State.FAILED | State.LOST:
            found = None
        case _:
            assert_never(state)
    if found is None:
        raise IllegalEventError(state, event, _admitting(event))
    return found


def _before_commit(state: State, event: Event) -> Transition | None:
    undo = {State.QUEUED: (), State.PREPARING: UNDO_PREPARE, State.SWITCHOVER: UNDO_SWITCH}[state]
    queued = state is State.QUEUED
    match event:
        case JobStarted() if queued:
            return Transition(State.PREPARING, PREPARE)
        case DestinationPrepared() if state is State.PREPARING:
            return Transition(State.SWITCHOVER, SWITCH)
        case HandedOver() if state is State.SWITCHOVER:
            return Transition(State.COMMITTED, (RequestStart(),))
        case CancelRequested(code, reason):
            return Transition(State.CANCELLED if queued else State.CANCELLING, undo, code, reason)
        case Failed(code, reason):
            return Transition(State.FAILED if queued else State.FAILING, undo, code, reason)
        case _:
            return None


def _after_commit(event: Event) -> Transition | None:
    match event:
        case Started():
            return Transition(State.POSTCOPY)
        case StartUnanswered(reason):
            return Transition(State.UNDECIDED, (), Reason.UNDECIDED, reason)
        case OutcomeReceived(outcome, reason):
            return _settle(outcome, reason)
        case _:
            return None


def _settle(outcome: Outcome, reason: str) -> Transition:
    match outcome:
        case Outcome.RUNNING | Outcome.COMPLETED:
            return Transition(State.POSTCOPY)
        case Outcome.REFUSED:
            words = f"the destination refused after the commit: {reason or 'no reason given'}"
            return Transition(State.FAILING, TAKE_BACK, Reason.MIGRATION_REFUSED, words)
        case Outcome.PREPARED:
            words = "the destination has not started the VM yet and is asked again"
            words = f"{words}: {reason}" if reason else words
            return Transition(State.UNDECIDED, (RequestStart(),), Reason.UNDECIDED, words)
        case Outcome.UNKNOWN:
            words = (
                f"the destination's journal says {outcome} of a migration that it had answered ready: its journal was "
                "lost or is another's; find out by hand whether the VM runs there, and bring the right journal back"
            )
            return Transition(State.UNDECIDED, (), Reason.UNDECIDED, words)
        case _:
            assert_never(outcome)


def _postcopy(state: State, event: Event) -> Transition | None:
    match event:
        case DestinationReported(""):
            return Transition(State.POSTCOPY)
        case DestinationReported(why):
            return Transition(State.POSTCOPY_PAUSED, (), Reason.LINK_DOWN, why)
        case DestinationSilent(why):
            return Transition(state, (), Reason.DESTINATION_UNREACHABLE, why)
        case DestinationCompleted():
            return Transition(State.COMPLETING, RELEASE)
        case DestinationDied(why):
            return Transition(State.LOST, (RemovePager(),), Reason.VMM_GONE, why)
        case _:
            return None


def _restoring(state: State, event: Event) -> Transition | None:
    match event:
        case CancelRequested():
            return Transition(state)
        case Restored():
            return Transition(State.CANCELLED if state is State.CANCELLING else State.FAILED)
        case RestoreFailed(code, reason):
            return Transition(State.FAILED, (), code, reason)
        case _:
            return None


def _admitting(event: Event) -> frozenset[State]:  # noqa: PLR0911 one for each event
    match event:
        case JobStarted():
            return frozenset({State.QUEUED})
        case DestinationPrepared():
            return frozenset({State.PREPARING})
        case HandedOver():
            return frozenset({State.SWITCHOVER})
        case Started() | StartUnanswered() | OutcomeReceived():
            return frozenset({State.COMMITTED, State.UNDECIDED})
        case DestinationReported() | DestinationSilent() | DestinationCompleted() | DestinationDied():
            return frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED})
        case SourceReleased():
            return frozenset({State.COMPLETING})
        case CancelRequested():
            return CANCELLABLE | RESTORING
        case Failed():
            return CANCELLABLE
        case Restored() | RestoreFailed():
            return RESTORING
        case _:
            assert_never(event)


RESTARTED = "the daemon was restarted before the commit"


def recovered(
    phase: Phase, kinds: Collection[str], code: Reason = Reason.SHUTTING_DOWN, why: str = RESTARTED
) -> Transition | None:
    """The step with which a job continues after a restart, by its last phase and its journal. None: it has ended.

    `code` and `why` are the reason of a job that was before its commit.
    """
    undo = Transition(State.FAILING, UNDO_SWITCH, code, why)
    if State(phase.value) in ENDED:
        return None
    if JournalKind.SETTLED in kinds:
        return _settle(Outcome.REFUSED, "")
    if JournalKind.COMMIT in kinds and JournalKind.ABORTED not in kinds:
        if phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            return Transition(State(phase.value))
        return Transition(State.COMMITTED, (RequestStart(),))
    if JournalKind.BEGIN in kinds:
        return undo
    return Transition(State.FAILING, UNDO_PREPARE, code, why)
