"""What `state_machine.py` asks to be done on the source, and in which order. Values only; `steps.py` does them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.model.journal import JournalKind


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
class SendHello:
    """Agree on the protocol with the destination."""


@dataclass(frozen=True, slots=True)
class RequestPrepare:
    """Let the destination make layout, pager and memory, and connect the lane."""


@dataclass(frozen=True, slots=True)
class AppendJournal:
    """Make a fact durable."""

    kind: JournalKind


@dataclass(frozen=True, slots=True)
class HandOver:
    """The blackout begins: the vCPUs stop. Then device state and ledger go to the destination, and meanwhile the pager
    is told the ledger, and that pages may be served, and the commit is made durable."""


@dataclass(frozen=True, slots=True)
class RequestStart:
    """Ask the destination to run the VM; repeated until answered or the deadline."""


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
class RequestRefuse:
    """The destination shall refuse and keep nothing."""


@dataclass(frozen=True, slots=True)
class SendFinish:
    """The destination may forget the source."""


Command: TypeAlias = (
    StartPager
    | ServePages
    | AttachMemory
    | SendHello
    | RequestPrepare
    | AppendJournal
    | HandOver
    | RequestStart
    | ThawPager
    | ResumeVcpus
    | AbandonVmm
    | RemovePager
    | RequestRefuse
    | SendFinish
)

PREPARE: tuple[Command, ...] = (StartPager(), ServePages(), AttachMemory(), SendHello(), RequestPrepare())
SWITCH: tuple[Command, ...] = (
    AppendJournal(JournalKind.BEGIN),
    HandOver(),
)
UNDO_PREPARE: tuple[Command, ...] = (RemovePager(), RequestRefuse())
# The VM comes first: it must not wait for a destination that may be what failed. `aborted` is durable before it runs,
# so that a commit that was written before the destination failed can never be taken up after a restart.
UNDO_SWITCH: tuple[Command, ...] = (
    AppendJournal(JournalKind.ABORTED),
    ThawPager(),
    ResumeVcpus(),
    RemovePager(),
    RequestRefuse(),
)
TAKE_BACK: tuple[Command, ...] = (AppendJournal(JournalKind.SETTLED), ThawPager(), ResumeVcpus(), RemovePager())
RELEASE: tuple[Command, ...] = (AbandonVmm(), RemovePager(), SendFinish())
