"""The commands of `state_machine.py`, and their order. Values only; `steps.py` performs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.model.journal import JournalKind


@dataclass(frozen=True, slots=True)
class StartPager:
    """Start the source's pager."""


@dataclass(frozen=True, slots=True)
class ServePages:
    """Open the source pager's port for the lanes."""


@dataclass(frozen=True, slots=True)
class AttachMemory:
    """Have the VMM hand its memory to the pager."""


@dataclass(frozen=True, slots=True)
class MarkPoison:
    """Tell the pager of the known memory errors. The blackout carries only those that come later."""


@dataclass(frozen=True, slots=True)
class SendHello:
    """Negotiate the protocol with the destination."""


@dataclass(frozen=True, slots=True)
class RequestPrepare:
    """Have the destination make layout, pager and memory, and connect the lanes."""


@dataclass(frozen=True, slots=True)
class ReserveJournal:
    """Take the store's write lock, so that no entry of the blackout waits for another process."""


@dataclass(frozen=True, slots=True)
class AppendJournal:
    """Make a fact durable in the journal."""

    kind: JournalKind


@dataclass(frozen=True, slots=True)
class HandOver:
    """Begin the blackout and hand the VM over: the vCPUs stop, then two things run concurrently.

    Device state and ledger go to the destination. The pager gets the ledger and may serve pages, and the commit is
    journalled.
    """


@dataclass(frozen=True, slots=True)
class RequestStart:
    """Ask the destination to run the VM, repeatedly until its answer or the deadline."""


@dataclass(frozen=True, slots=True)
class RevokeCommit:
    """Make sure that a commit, if one was tried, never counts: by `aborted` here, or by the destination's `refused`."""


@dataclass(frozen=True, slots=True)
class ThawPager:
    """Have the pager serve no more pages."""


@dataclass(frozen=True, slots=True)
class ResumeVcpus:
    """Run the VM on the source again."""


@dataclass(frozen=True, slots=True)
class AbandonVmm:
    """Release the VMM of a VM that has moved."""


@dataclass(frozen=True, slots=True)
class RemovePager:
    """End the source's pager and remove its directory."""


@dataclass(frozen=True, slots=True)
class RequestRefuse:
    """Have the destination refuse and keep nothing."""


@dataclass(frozen=True, slots=True)
class SendFinish:
    """Tell the destination that the source has ended."""


Command: TypeAlias = (
    StartPager
    | ServePages
    | AttachMemory
    | MarkPoison
    | SendHello
    | RequestPrepare
    | ReserveJournal
    | AppendJournal
    | HandOver
    | RequestStart
    | RevokeCommit
    | ThawPager
    | ResumeVcpus
    | AbandonVmm
    | RemovePager
    | RequestRefuse
    | SendFinish
)

PREPARE: tuple[Command, ...] = (
    StartPager(),
    ServePages(),
    AttachMemory(),
    MarkPoison(),
    SendHello(),
    RequestPrepare(),
)
SWITCH: tuple[Command, ...] = (
    ReserveJournal(),
    AppendJournal(JournalKind.BEGIN),
    HandOver(),
)
UNDO_PREPARE: tuple[Command, ...] = (RemovePager(), RequestRefuse())
# The VM comes first: it waits only for the end of a commit that may be durable. Without a commit the destination never
# starts the VM, also after a restart, so `aborted` may follow. Pages that the pager serves until its thaw go to memory
# that never runs.
UNDO_SWITCH: tuple[Command, ...] = (
    RevokeCommit(),
    ResumeVcpus(),
    AppendJournal(JournalKind.ABORTED),
    ThawPager(),
    RemovePager(),
    RequestRefuse(),
)
TAKE_BACK: tuple[Command, ...] = (AppendJournal(JournalKind.SETTLED), ResumeVcpus(), ThawPager(), RemovePager())
RELEASE: tuple[Command, ...] = (AbandonVmm(), RemovePager(), SendFinish())
