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

A repeated request follows a lost answer, and is answered as done. `running` and `refused` exclude each other: the first
one in the journal wins, and the other request is refused from then on. A refusal of an unknown migration is journalled
too, so that a late Prepare or Start is refused.

The journal has no entry for Ready. The VMM loads the device state as the last step of Ready, after ledger, markers and
link. Start checks that the VMM holds it. A Start without a complete Ready is refused, because the source may have
committed while Ready was running.
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
    """The outcome that the source receives."""
    return Outcome.RUNNING if state is State.LOST else Outcome(state.value)


@dataclass(frozen=True, slots=True)
class PrepareRequested:
    """Make pager, layout and memory."""


@dataclass(frozen=True, slots=True)
class ReadyRequested:
    """Take ledger and device state."""


@dataclass(frozen=True, slots=True)
class StartRequested:
    """The source has committed, and asks for the VM to run."""


@dataclass(frozen=True, slots=True)
class RefuseRequested:
    """The source wants the VM back, or this host cannot run it."""


@dataclass(frozen=True, slots=True)
class AllArrived:
    """The pager has every page, and the VMM knows that."""


@dataclass(frozen=True, slots=True)
class VmDied:
    """The VMM's process is gone, and the VM with it if it ran here."""


Event: TypeAlias = PrepareRequested | ReadyRequested | StartRequested | RefuseRequested | AllArrived | VmDied


@dataclass(frozen=True, slots=True)
class MakeMemory:
    """Start the pager. The VMM makes its memory and attaches it."""


@dataclass(frozen=True, slots=True)
class TakeLedger:
    """Merge the source's ledger, each entry one hop older, and make it durable."""


@dataclass(frozen=True, slots=True)
class ConnectLanes:
    """Connect the lanes and mark known poison. Faults are answered once the source's VM is frozen."""


@dataclass(frozen=True, slots=True)
class CheckPager:
    """Check that the pager runs and its link is up."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """Load the device state into the VMM. At the same time the store shows by a write that it can keep `running`."""


@dataclass(frozen=True, slots=True)
class CheckVmm:
    """Check that the VMM is connected and holds the device state. Otherwise this host refuses while it still can."""


@dataclass(frozen=True, slots=True)
class AppendJournal:
    """Append an entry to the journal."""

    kind: JournalKind


@dataclass(frozen=True, slots=True)
class StartVcpus:
    """Run the VM here."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Reset the VMM to its state before the migration, and remove the pager."""


@dataclass(frozen=True, slots=True)
class SaveGuard:
    """Make the number of guarded pages durable: a restarted daemon must keep a pager that guards pages."""


@dataclass(frozen=True, slots=True)
class RemovePager:
    """Remove the pager of a lost VM."""


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
    """The next state, and the commands that lead there, in order."""

    state: State
    commands: tuple[Command, ...] = ()


PREPARE: tuple[Command, ...] = (MakeMemory(), TakeLedger(), ConnectLanes(), AppendJournal(JournalKind.PREPARED))
# LoadState comes last. A VMM that holds the state is ready, also after a restart of either daemon. A repeated Ready
# loads it again, and a VMM that holds it answers as done.
READY: tuple[Command, ...] = (TakeLedger(), CheckPager(), LoadState())
# `running` is durable before a vCPU runs. From then on this host refuses a Refuse.
START: tuple[Command, ...] = (CheckVmm(), AppendJournal(JournalKind.RUNNING), StartVcpus())
REFUSE: tuple[Command, ...] = (AppendJournal(JournalKind.REFUSED), GiveBack())

COMPLETE: tuple[Command, ...] = (SaveGuard(), AppendJournal(JournalKind.COMPLETED))
LOSE: tuple[Command, ...] = (AppendJournal(JournalKind.LOST), RemovePager())

_ORDER = (State.UNKNOWN, State.PREPARED, State.RUNNING, State.COMPLETED, State.LOST)


def answer(state: State, event: Event, migration: str) -> Answer:
    """Decides about an event.

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
                "The VM is on this host now. To move it back, start a new migration from this host.",
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
