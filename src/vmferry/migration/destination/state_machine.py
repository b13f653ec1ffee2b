"""The destination's side as a state machine: pure. The states are what its journal says.

Edges (a test compares them with the code):

    UNKNOWN   -> PREPARED   PrepareRequested
    UNKNOWN   -> REFUSED    RefuseRequested
    PREPARED  -> PREPARED   PrepareRequested
    PREPARED  -> PREPARED   ReadyRequested
    PREPARED  -> RUNNING    StartRequested
    PREPARED  -> REFUSED    RefuseRequested
    RUNNING   -> RUNNING    PrepareRequested
    RUNNING   -> RUNNING    ReadyRequested
    RUNNING   -> RUNNING    StartRequested
    RUNNING   -> COMPLETED  AllArrived
    COMPLETED -> COMPLETED  PrepareRequested
    COMPLETED -> COMPLETED  ReadyRequested
    COMPLETED -> COMPLETED  StartRequested
    COMPLETED -> COMPLETED  AllArrived
    REFUSED   -> REFUSED    RefuseRequested

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
from typing import TypeAlias, assert_never

from vmferry.errors import Reason, VmferryError
from vmferry.model.journal import JournalKind
from vmferry.model.migration import Outcome


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


Request: TypeAlias = PrepareRequested | ReadyRequested | StartRequested | RefuseRequested | AllArrived


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
    """The VMM waits again as if nothing had been; the pager goes."""


Command: TypeAlias = (
    MakeMemory | TakeLedger | ConnectLanes | CheckPager | LoadState | CheckVmm | AppendJournal | StartVcpus | GiveBack
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome once `commands` are done, in order."""

    outcome: Outcome
    commands: tuple[Command, ...] = ()


PREPARE: tuple[Command, ...] = (MakeMemory(), TakeLedger(), ConnectLanes(), AppendJournal(JournalKind.PREPARED))
# The state comes last: a VMM that holds it is ready, whoever asks for the start, and whatever was restarted meanwhile.
# A Ready that is repeated loads it again, which a VMM that has it answers as done.
READY: tuple[Command, ...] = (TakeLedger(), CheckPager(), LoadState())
# `running` is durable before a vCPU runs: from then on a Refuse is refused.
START: tuple[Command, ...] = (CheckVmm(), AppendJournal(JournalKind.RUNNING), StartVcpus())
REFUSE: tuple[Command, ...] = (AppendJournal(JournalKind.REFUSED), GiveBack())

_ORDER = (Outcome.UNKNOWN, Outcome.PREPARED, Outcome.RUNNING, Outcome.COMPLETED)


def answer(outcome: Outcome, request: Request, migration: str) -> Answer:
    """What to do about a request.

    Raises: VmferryError MIGRATION_REFUSED, MIGRATION_RUNNING, or MIGRATION_UNKNOWN for a step out of order.
    """
    match request:
        case RefuseRequested():
            return _refuse(outcome, migration)
        case PrepareRequested():
            return _step(outcome, Outcome.UNKNOWN, Answer(Outcome.PREPARED, PREPARE), request, migration)
        case ReadyRequested():
            return _step(outcome, Outcome.PREPARED, Answer(Outcome.PREPARED, READY), request, migration)
        case StartRequested():
            if outcome is Outcome.RUNNING:
                return Answer(outcome, (StartVcpus(),))
            return _step(outcome, Outcome.PREPARED, Answer(Outcome.RUNNING, START), request, migration)
        case AllArrived():
            done = Answer(Outcome.COMPLETED, (AppendJournal(JournalKind.COMPLETED),))
            return _step(outcome, Outcome.RUNNING, done, request, migration)
        case _:
            assert_never(request)


def _refuse(outcome: Outcome, migration: str) -> Answer:
    if outcome in (Outcome.RUNNING, Outcome.COMPLETED):
        raise VmferryError(
            Reason.MIGRATION_RUNNING,
            f"{migration} is {outcome} on this host; it can be refused only before it runs.",
            "The VM is here now; migrate it back if it is wanted elsewhere.",
        )
    if outcome is Outcome.REFUSED:
        return Answer(outcome, (GiveBack(),))
    return Answer(Outcome.REFUSED, REFUSE)


def _step(outcome: Outcome, required: Outcome, done: Answer, request: Request, migration: str) -> Answer:
    if outcome is Outcome.REFUSED:
        raise VmferryError(
            Reason.MIGRATION_REFUSED,
            f"{migration} was refused on this host and will never run here.",
            "Begin a new migration, under another name.",
        )
    if outcome is required:
        return done
    if _ORDER.index(outcome) > _ORDER.index(required):
        return Answer(outcome)
    raise VmferryError(
        Reason.MIGRATION_UNKNOWN,
        f"{type(request).__name__} for {migration}, which is {outcome} on this host; it must be {required}.",
        "If this host's journal was lost, bring it back; else cancel the migration on its source.",
    )


def outcome_of(kinds: Collection[str]) -> Outcome:
    """What a journal says. `refused` and `running` cannot both be there; if they were, the VM runs."""
    for kind, outcome in (
        (JournalKind.COMPLETED, Outcome.COMPLETED),
        (JournalKind.RUNNING, Outcome.RUNNING),
        (JournalKind.REFUSED, Outcome.REFUSED),
        (JournalKind.PREPARED, Outcome.PREPARED),
    ):
        if kind in kinds:
            return outcome
    return Outcome.UNKNOWN
