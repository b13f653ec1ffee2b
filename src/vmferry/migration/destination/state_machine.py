"""The destination's side as a state machine: pure. The journal tells the state.

Edges (a test compares them with the code):

    UNKNOWN   -> PREPARED   PrepareRequested
    UNKNOWN   -> REFUSED    RefuseRequested
    UNKNOWN   -> REFUSED    VmDied
    PREPARED  -> PREPARED   PrepareRequested
    PREPARED  -> PREPARED   ReadyRequested
    PREPARED  -> RUNNING    StartRequested
    PREPARED  -> REFUSED    RefuseRequested
    PREPARED  -> REFUSED    VmDied
    RUNNING   -> RUNNING    PrepareRequested
    RUNNING   -> RUNNING    ReadyRequested
    RUNNING   -> RUNNING    StartRequested
    RUNNING   -> COMPLETED  AllArrived
    RUNNING   -> LOST       VmDied
    COMPLETED -> COMPLETED  PrepareRequested
    COMPLETED -> COMPLETED  ReadyRequested
    COMPLETED -> COMPLETED  StartRequested
    COMPLETED -> COMPLETED  AllArrived
    COMPLETED -> COMPLETED  VmDied
    LOST      -> LOST       PrepareRequested
    LOST      -> LOST       ReadyRequested
    LOST      -> LOST       AllArrived
    LOST      -> LOST       VmDied
    REFUSED   -> REFUSED    RefuseRequested
    REFUSED   -> REFUSED    VmDied

A repeated request is a lost answer and is answered as done. `running` and `refused` exclude each other: whichever is
journalled first wins, and the other request is refused from then on, also for a migration that never came this far: a
refusal of an unknown migration is journalled, so that its late Prepare or Start finds it.

That Ready was answered is in no journal here: the VMM holds the device state only once all that Ready is about
(ledger, markers, lane) was done, and that it does is looked up before `running`. So a Start whose Ready never came, or
came only half, is refused: the source may have committed while Ready was still under way.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, assert_never

from vmferry.errors import Reason, VmferryError
from vmferry.model.journal import JournalKind
from vmferry.model.migration import Outcome


class State(StrEnum):
    """The state of an incoming migration. `Outcome` is its public form: LOST is shown as RUNNING with a reason."""

    UNKNOWN = "UNKNOWN"
    PREPARED = "PREPARED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    LOST = "LOST"
    REFUSED = "REFUSED"


def outcome_of(state: State) -> Outcome:
    """The outcome that the source is told."""
    return Outcome.RUNNING if state is State.LOST else Outcome(state.value)


@dataclass(frozen=True, slots=True)
class PrepareRequested:
    """Make pager, layout and memory."""


@dataclass(frozen=True, slots=True)
class ReadyRequested:
    """Take ledger and device state."""


@dataclass(frozen=True, slots=True)
class StartRequested:
    """The source has committed."""


@dataclass(frozen=True, slots=True)
class RefuseRequested:
    """The source wants the VM back, or this host cannot run it."""


@dataclass(frozen=True, slots=True)
class AllArrived:
    """The pager has every page, and the VMM knows."""


@dataclass(frozen=True, slots=True)
class VmDied:
    """The VMM's process is gone, and with it the VM if it ran here."""


Event: TypeAlias = PrepareRequested | ReadyRequested | StartRequested | RefuseRequested | AllArrived | VmDied


@dataclass(frozen=True, slots=True)
class MakeMemory:
    """Start the pager; let the VMM make its memory and attach it."""


@dataclass(frozen=True, slots=True)
class TakeLedger:
    """Merge the source's ledger, one hop older; durable."""


@dataclass(frozen=True, slots=True)
class ConnectLanes:
    """Faults are answered once the source's VM stands still; known poison is marked."""


@dataclass(frozen=True, slots=True)
class CheckPager:
    """The pager must be there, and its lane up."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """The VMM takes the device state."""


@dataclass(frozen=True, slots=True)
class CheckVmm:
    """The VMM must be there with its device state, or this host refuses while it still may."""


@dataclass(frozen=True, slots=True)
class AppendJournal:
    """Append to the journal."""

    kind: JournalKind


@dataclass(frozen=True, slots=True)
class StartVcpus:
    """The VM runs here."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The VMM waits again as before the migration; the pager goes."""


@dataclass(frozen=True, slots=True)
class SaveGuard:
    """Make the number of guarded pages durable: a restarted daemon must keep a pager that guards pages."""


@dataclass(frozen=True, slots=True)
class RemovePager:
    """The pager of a VM that was lost goes."""


Command: TypeAlias = (
    MakeMemory
    | TakeLedger
    | ConnectLanes
    | CheckPager
    | LoadState
    | CheckVmm
    | AppendJournal
    | StartVcpus
    | GiveBack
    | SaveGuard
    | RemovePager
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The state once `commands` are done, in order."""

    state: State
    commands: tuple[Command, ...] = ()


PREPARE: tuple[Command, ...] = (MakeMemory(), TakeLedger(), ConnectLanes(), AppendJournal(JournalKind.PREPARED))
# The state comes last: a VMM that holds it is ready, whoever asks for the start, and whatever was restarted meanwhile.
# A Ready that is repeated loads it again, which a VMM that has it answers as done.
READY: tuple[Command, ...] = (TakeLedger(), CheckPager(), LoadState())
# `running` is durable before a vCPU runs: from then on a Refuse is refused.
START: tuple[Command, ...] = (CheckVmm(), AppendJournal(JournalKind.RUNNING), StartVcpus())
REFUSE: tuple[Command, ...] = (AppendJournal(JournalKind.REFUSED), GiveBack())

COMPLETE: tuple[Command, ...] = (SaveGuard(), AppendJournal(JournalKind.COMPLETED))
LOSE: tuple[Command, ...] = (AppendJournal(JournalKind.LOST), RemovePager())

_ORDER = (State.UNKNOWN, State.PREPARED, State.RUNNING, State.COMPLETED, State.LOST)


def answer(state: State, event: Event, migration: str) -> Answer:
    """The next state and the commands that lead there.

    Raises: VmferryError MIGRATION_REFUSED, MIGRATION_RUNNING, VMM_GONE, or MIGRATION_UNKNOWN for a step out of order.
    """
    match event:
        case RefuseRequested():
            return _refuse(state, migration)
        case PrepareRequested():
            return _step(state, State.UNKNOWN, Answer(State.PREPARED, PREPARE), event, migration)
        case ReadyRequested():
            return _step(state, State.PREPARED, Answer(State.PREPARED, READY), event, migration)
        case StartRequested():
            return _start(state, event, migration)
        case AllArrived():
            return _step(state, State.RUNNING, Answer(State.COMPLETED, COMPLETE), event, migration)
        case VmDied():
            return _vm_died(state)
        case _:
            assert_never(event)


def _refuse(state: State, migration: str) -> Answer:
    match state:
        case State.UNKNOWN | State.PREPARED:
            return Answer(State.REFUSED, REFUSE)
        case State.REFUSED:
            return Answer(state, (GiveBack(),))
        case State.RUNNING | State.COMPLETED | State.LOST:
            raise VmferryError(
                Reason.MIGRATION_RUNNING,
                f"{migration} is {state} on this host; it can be refused only before it runs.",
                "The VM is here now; migrate it back if it is wanted elsewhere.",
            )
        case _:
            assert_never(state)


def _start(state: State, event: Event, migration: str) -> Answer:
    if state is State.RUNNING:
        return Answer(state, (StartVcpus(),))
    if state is State.LOST:
        raise VmferryError(
            Reason.VMM_GONE,
            f"{migration} is {state} on this host: its VM ran here until its VMM died.",
            "Look at the VMM's own log for why.",
        )
    return _step(state, State.PREPARED, Answer(State.RUNNING, START), event, migration)


def _vm_died(state: State) -> Answer:
    match state:
        case State.UNKNOWN | State.PREPARED:
            return Answer(State.REFUSED, REFUSE)
        case State.RUNNING:
            return Answer(State.LOST, LOSE)
        case State.LOST:
            return Answer(state, (RemovePager(),))
        case State.COMPLETED | State.REFUSED:
            return Answer(state)
        case _:
            assert_never(state)


def _step(state: State, required: State, done: Answer, event: Event, migration: str) -> Answer:
    if state is State.REFUSED:
        raise VmferryError(
            Reason.MIGRATION_REFUSED,
            f"{migration} was refused on this host and will never run here.",
            "Begin a new migration, under another name.",
        )
    if state is required:
        return done
    if _ORDER.index(state) > _ORDER.index(required):
        return Answer(state)
    raise VmferryError(
        Reason.MIGRATION_UNKNOWN,
        f"{type(event).__name__} for {migration}, which is {state} on this host; it must be {required}.",
        "If this host's journal was lost, bring it back; else cancel the migration on its source.",
    )


def state_of(kinds: Collection[str]) -> State:
    """The state that a journal proves. `refused` and `running` exclude each other; of both, `running` would count."""
    for kind, state in (
        (JournalKind.LOST, State.LOST),
        (JournalKind.COMPLETED, State.COMPLETED),
        (JournalKind.RUNNING, State.RUNNING),
        (JournalKind.REFUSED, State.REFUSED),
        (JournalKind.PREPARED, State.PREPARED),
    ):
        if kind in kinds:
            return state
    return State.UNKNOWN
