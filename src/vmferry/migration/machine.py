"""The source's job as a state machine: pure, (state, event) → (state, commands).

Edges (a test compares them with the code):

    QUEUED          -> PREPARING        Begun
    QUEUED          -> CANCELLED        CancelAsked
    QUEUED          -> FAILED           Failed
    PREPARING       -> SWITCHOVER       DestinationPrepared
    PREPARING       -> CANCELLING       CancelAsked
    PREPARING       -> FAILING          Failed
    SWITCHOVER      -> COMMITTED        CommitDurable
    SWITCHOVER      -> CANCELLING       CancelAsked
    SWITCHOVER      -> FAILING          Failed
    COMMITTED       -> POSTCOPY         Started
    COMMITTED       -> UNDECIDED        StartUnanswered
    COMMITTED       -> POSTCOPY         OutcomeLearned
    COMMITTED       -> UNDECIDED        OutcomeLearned
    COMMITTED       -> FAILING          OutcomeLearned
    UNDECIDED       -> POSTCOPY         Started
    UNDECIDED       -> UNDECIDED        StartUnanswered
    UNDECIDED       -> POSTCOPY         OutcomeLearned
    UNDECIDED       -> UNDECIDED        OutcomeLearned
    UNDECIDED       -> FAILING          OutcomeLearned
    POSTCOPY        -> POSTCOPY         Heard
    POSTCOPY        -> POSTCOPY_PAUSED  Heard
    POSTCOPY        -> POSTCOPY         Silent
    POSTCOPY        -> COMPLETING       DestinationCompleted
    POSTCOPY        -> LOST             DestinationDied
    POSTCOPY_PAUSED -> POSTCOPY         Heard
    POSTCOPY_PAUSED -> POSTCOPY_PAUSED  Heard
    POSTCOPY_PAUSED -> POSTCOPY_PAUSED  Silent
    POSTCOPY_PAUSED -> COMPLETING       DestinationCompleted
    POSTCOPY_PAUSED -> LOST             DestinationDied
    COMPLETING      -> COMPLETED        SourceReleased
    CANCELLING      -> CANCELLING       CancelAsked
    CANCELLING      -> CANCELLED        Restored
    CANCELLING      -> FAILED           RestoreFailed
    FAILING         -> FAILING          CancelAsked
    FAILING         -> FAILED           Restored
    FAILING         -> FAILED           RestoreFailed

`State` has four states that the API does not show: COMMITTED (shown as SWITCHOVER: the commit is durable, the first
Start is on its way), COMPLETING (shown as POSTCOPY), CANCELLING and FAILING (shown as the phase before: the VM is not
back yet). The commit is the point of no return: behind it the only way back to the source is the destination's own
word that it has journalled `refused`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, assert_never

from vmferry.errors import Reason, VmferryError
from vmferry.migration.model import Outcome, Phase


class JournalKind(StrEnum):
    """Kinds of journal entries. The source's and the destination's never mix, so one journal can hold both."""

    BEGIN = "begin"
    COMMIT = "commit"
    ABORTED = "aborted"
    SETTLED = "settled"
    PREPARED = "prepared"
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    REFUSED = "refused"
    LOST = "lost"


class State(StrEnum):
    """Where the job stands; finer than `Phase`, see the module's docstring."""

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
    """The phase that the API shows in `state`, when it showed `before` until now."""
    match state:
        case State.COMMITTED:
            return Phase.SWITCHOVER
        case State.COMPLETING | State.CANCELLING | State.FAILING:
            return before
        case _:
            return Phase(state.value)


# events


@dataclass(frozen=True, slots=True)
class Begun:
    """The job's turn has come."""


@dataclass(frozen=True, slots=True)
class DestinationPrepared:
    """Both pagers and the destination's VMM stand ready."""


@dataclass(frozen=True, slots=True)
class CommitDurable:
    """The commit is in the journal."""


@dataclass(frozen=True, slots=True)
class Started:
    """The destination answered Start. `started_us`: its clock, Unix microseconds."""

    started_us: int


@dataclass(frozen=True, slots=True)
class StartUnanswered:
    """After the commit, no answer within the deadline."""

    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeLearned:
    """The destination's journal spoke."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Heard:
    """The destination reported. `paused_reason`: why its link is down, empty while it is up."""

    paused_reason: str


@dataclass(frozen=True, slots=True)
class Silent:
    """The destination's daemon does not answer during postcopy; pagers go on without it."""

    reason: str


@dataclass(frozen=True, slots=True)
class DestinationCompleted:
    """All pages are there."""


@dataclass(frozen=True, slots=True)
class DestinationDied:
    """The VM's process died on the destination after it ran there."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceReleased:
    """The source's VMM and pager are gone."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The operator, or a daemon that stops, asks for the VM back. `code` says which."""

    code: Reason = Reason.CANCELLED
    reason: str = "cancelled on request"


@dataclass(frozen=True, slots=True)
class Failed:
    """A step before the commit failed."""

    code: Reason
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    """The VM runs on the source again."""


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """The VM could not be resumed on the source: its VMM is gone."""

    code: Reason
    reason: str


Event: TypeAlias = (
    Begun
    | DestinationPrepared
    | CommitDurable
    | Started
    | StartUnanswered
    | OutcomeLearned
    | Heard
    | Silent
    | DestinationCompleted
    | DestinationDied
    | SourceReleased
    | CancelAsked
    | Failed
    | Restored
    | RestoreFailed
)


# commands


@dataclass(frozen=True, slots=True)
class StartPager:
    """Start the source's pager."""


@dataclass(frozen=True, slots=True)
class ServePages:
    """Open the source pager's port for lanes."""


@dataclass(frozen=True, slots=True)
class AttachMemory:
    """Let the VMM hand its memory to the pager."""


@dataclass(frozen=True, slots=True)
class SayHello:
    """Agree on the protocol with the destination."""


@dataclass(frozen=True, slots=True)
class AskPrepare:
    """Let the destination make layout, pager and memory."""


@dataclass(frozen=True, slots=True)
class Journal:
    """Make a fact durable."""

    kind: JournalKind


@dataclass(frozen=True, slots=True)
class StopVcpus:
    """The blackout begins."""


@dataclass(frozen=True, slots=True)
class FreezePager:
    """Pages may be served."""


@dataclass(frozen=True, slots=True)
class SaveState:
    """Take the device state."""


@dataclass(frozen=True, slots=True)
class MarkKnownPoison:
    """Tell the source's pager the ledger."""


@dataclass(frozen=True, slots=True)
class SendReady:
    """Device state, ledger and lane address go to the destination."""


@dataclass(frozen=True, slots=True)
class CallStart:
    """Ask the destination to run the VM; repeated until answered or the deadline."""


@dataclass(frozen=True, slots=True)
class AskOutcome:
    """Ask the destination's journal, with back-off, for ever."""


@dataclass(frozen=True, slots=True)
class WatchDestination:
    """Follow the postcopy; connects again for ever."""


@dataclass(frozen=True, slots=True)
class ThawPager:
    """No more pages are served."""


@dataclass(frozen=True, slots=True)
class ResumeVcpus:
    """The VM runs on the source again."""


@dataclass(frozen=True, slots=True)
class AbandonVmm:
    """The VM has moved: its VMM here may go."""


@dataclass(frozen=True, slots=True)
class RemovePager:
    """The source's pager ends and its directory goes."""


@dataclass(frozen=True, slots=True)
class AskRefuse:
    """The destination shall refuse and keep nothing."""


@dataclass(frozen=True, slots=True)
class SayFinish:
    """The destination may forget the source."""


Command: TypeAlias = (
    StartPager
    | ServePages
    | AttachMemory
    | SayHello
    | AskPrepare
    | Journal
    | StopVcpus
    | FreezePager
    | SaveState
    | MarkKnownPoison
    | SendReady
    | CallStart
    | AskOutcome
    | WatchDestination
    | ThawPager
    | ResumeVcpus
    | AbandonVmm
    | RemovePager
    | AskRefuse
    | SayFinish
)

PREPARE: tuple[Command, ...] = (StartPager(), ServePages(), AttachMemory(), SayHello(), AskPrepare())
SWITCH: tuple[Command, ...] = (
    Journal(JournalKind.BEGIN),
    StopVcpus(),
    FreezePager(),
    SaveState(),
    MarkKnownPoison(),
    SendReady(),
    Journal(JournalKind.COMMIT),
)
UNDO_PREPARE: tuple[Command, ...] = (RemovePager(), AskRefuse())
# The VM comes first: it must not wait for a destination that may be what failed. `aborted` is durable before it runs,
# so that a commit whose write was cut off half-way can never be taken up after a restart.
UNDO_SWITCH: tuple[Command, ...] = (
    Journal(JournalKind.ABORTED),
    ThawPager(),
    ResumeVcpus(),
    RemovePager(),
    AskRefuse(),
)
TAKE_BACK: tuple[Command, ...] = (Journal(JournalKind.SETTLED), ThawPager(), ResumeVcpus(), RemovePager())
RELEASE: tuple[Command, ...] = (AbandonVmm(), RemovePager(), SayFinish())


@dataclass(frozen=True, slots=True)
class Transition:
    """Where the job stands now, why, and what is to be done there, in order."""

    state: State
    commands: tuple[Command, ...] = ()
    code: Reason | None = None
    reason: str = ""


class IllegalEventError(VmferryError):
    """An event that the state does not admit."""

    def __init__(self, state: State, event: Event, required: Collection[State]) -> None:
        past = isinstance(event, CancelAsked)
        names = ", ".join(sorted(required)) or "none"
        super().__init__(
            Reason.PAST_NO_RETURN if past else Reason.INTERNAL,
            f"{type(event).__name__} in state {state}; it needs {names}",
            "The VM belongs to the destination now; migrate it back once the job has ended." if past else "",
        )
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
        case Begun() if queued:
            return Transition(State.PREPARING, PREPARE)
        case DestinationPrepared() if state is State.PREPARING:
            return Transition(State.SWITCHOVER, SWITCH)
        case CommitDurable() if state is State.SWITCHOVER:
            return Transition(State.COMMITTED, (CallStart(),))
        case CancelAsked(code, reason):
            return Transition(State.CANCELLED if queued else State.CANCELLING, undo, code, reason)
        case Failed(code, reason):
            return Transition(State.FAILED if queued else State.FAILING, undo, code, reason)
        case _:
            return None


def _after_commit(event: Event) -> Transition | None:
    match event:
        case Started():
            return Transition(State.POSTCOPY, (WatchDestination(),))
        case StartUnanswered(reason):
            return Transition(State.UNDECIDED, (AskOutcome(),), Reason.UNDECIDED, reason)
        case OutcomeLearned(outcome, reason):
            return _settle(outcome, reason)
        case _:
            return None


def _settle(outcome: Outcome, reason: str) -> Transition:
    match outcome:
        case Outcome.RUNNING | Outcome.COMPLETED:
            return Transition(State.POSTCOPY, (WatchDestination(),))
        case Outcome.REFUSED:
            words = f"the destination refused after the commit: {reason or 'no reason given'}"
            return Transition(State.FAILING, TAKE_BACK, Reason.MIGRATION_REFUSED, words)
        case Outcome.READY:
            words = "the destination is ready and is asked to start again"
            return Transition(State.UNDECIDED, (CallStart(),), Reason.UNDECIDED, words)
        case Outcome.UNKNOWN | Outcome.PREPARED:
            words = (
                f"the destination's journal says {outcome} of a migration that it had answered ready: its journal was "
                "lost or is another's; find out by hand whether the VM runs there, and bring the right journal back"
            )
            return Transition(State.UNDECIDED, (AskOutcome(),), Reason.UNDECIDED, words)
        case _:
            assert_never(outcome)


def _postcopy(state: State, event: Event) -> Transition | None:
    match event:
        case Heard(""):
            return Transition(State.POSTCOPY, (WatchDestination(),))
        case Heard(why):
            return Transition(State.POSTCOPY_PAUSED, (WatchDestination(),), Reason.LINK_DOWN, why)
        case Silent(why):
            return Transition(state, (WatchDestination(),), Reason.DESTINATION_UNREACHABLE, why)
        case DestinationCompleted():
            return Transition(State.COMPLETING, RELEASE)
        case DestinationDied(why):
            return Transition(State.LOST, (RemovePager(),), Reason.VMM_GONE, why)
        case _:
            return None


def _restoring(state: State, event: Event) -> Transition | None:
    match event:
        case CancelAsked():
            return Transition(state)
        case Restored():
            return Transition(State.CANCELLED if state is State.CANCELLING else State.FAILED)
        case RestoreFailed(code, reason):
            return Transition(State.FAILED, (), code, reason)
        case _:
            return None


def _admitting(event: Event) -> frozenset[State]:  # noqa: PLR0911 one for each event
    match event:
        case Begun():
            return frozenset({State.QUEUED})
        case DestinationPrepared():
            return frozenset({State.PREPARING})
        case CommitDurable():
            return frozenset({State.SWITCHOVER})
        case Started() | StartUnanswered() | OutcomeLearned():
            return frozenset({State.COMMITTED, State.UNDECIDED})
        case Heard() | Silent() | DestinationCompleted() | DestinationDied():
            return frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED})
        case SourceReleased():
            return frozenset({State.COMPLETING})
        case CancelAsked():
            return CANCELLABLE | RESTORING
        case Failed():
            return CANCELLABLE
        case Restored() | RestoreFailed():
            return RESTORING
        case _:
            assert_never(event)


def recovered(phase: Phase, kinds: Collection[str]) -> Transition | None:
    """Where a job goes on after a restart of its daemon, by its last phase and its journal; None: it has ended."""
    stopped = "the daemon was restarted before the commit"
    undo = Transition(State.FAILING, UNDO_SWITCH, Reason.SHUTTING_DOWN, stopped)
    if State(phase.value) in ENDED:
        return None
    if JournalKind.SETTLED in kinds:
        return _settle(Outcome.REFUSED, "")
    if JournalKind.COMMIT in kinds and JournalKind.ABORTED not in kinds:
        if phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
            return Transition(State(phase.value), (WatchDestination(),))
        return Transition(State.COMMITTED, (CallStart(),))
    if JournalKind.BEGIN in kinds:
        return undo
    return Transition(State.FAILING, UNDO_PREPARE, Reason.SHUTTING_DOWN, stopped)
