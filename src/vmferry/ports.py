"""What the migration core needs of the world. The adapters (`vmm`, `pager`, `peer`, `store`) implement these
Protocols and do not know each other; `testing/` has a fake of each, run through the same contract tests.

Every method is safe to repeat. Every method may raise `VmferryError`; the reasons that callers plan for are named.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from vmferry.model.migration import (
    Incoming,
    Job,
    LedgerEntry,
    MemoryLayout,
    Outcome,
    PageProgress,
    PageRange,
    VmmIdentity,
)


class Clock(Protocol):
    """Time. `now_us` is Unix microseconds, `monotonic_s` never goes back."""

    def now_us(self) -> int: ...
    def monotonic_s(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class Processors(Protocol):
    """This host's processors. One that sleeps takes tens of microseconds to wake, and the parts of a switchover wake
    each other some thirty times, one after the other."""

    def keep_awake(self, who: str) -> None:
        """Until `let_sleep`, for a second at most."""

    def let_sleep(self, who: str) -> None:
        """Unless somebody else keeps them awake."""


class Vmm(Protocol):
    """A connected VMM. VMM_GONE: it died; VMM_REFUSED: it answered with an error; VMM_TIMEOUT: no answer."""

    @property
    def identity(self) -> VmmIdentity: ...

    # source
    async def attach_memory(self, socket: Path) -> None: ...
    async def stop(self) -> None: ...
    async def save_state(self) -> bytes: ...
    async def resume(self) -> None: ...
    async def abandon(self) -> None: ...

    # destination
    async def prepare(self, layout: MemoryLayout, vcpus: int, uffd_features: Sequence[str], socket: Path) -> None: ...
    async def load_state(self, state: bytes) -> None: ...
    async def start(self) -> None: ...
    async def migration_complete(self, keep_uffd: bool) -> None: ...
    async def reset(self) -> None: ...

    async def gone(self) -> str:
        """Waits until the connection ends; returns why."""
        ...


class Vmms(Protocol):
    """The VMMs connected to this daemon. One VM may have two here: one that runs and one that waits (same-host move).

    `running` finds a VMM in state running or stopped, one that runs first; `incoming` one in state incoming, prepared
    or loaded. A connection that ended is in none of them; the VMM's next connection is another `Vmm` with the same pid.
    """

    def running(self, vm: str) -> Vmm | None: ...
    def incoming(self, vm: str) -> Vmm | None: ...
    def all(self) -> Sequence[Vmm]: ...


@dataclass(frozen=True, slots=True)
class MemoryErrorFound:
    """The pager resolved a page as poison. `reported`: the VMM was told by this pager."""

    error: LedgerEntry
    hva: int
    thread: int
    reported: bool


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """`up` False: faults wait, `reason` says why."""

    up: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AllPresent:
    """The last absent page has arrived."""


@dataclass(frozen=True, slots=True)
class MemoryAttached:
    vmm_pid: int


@dataclass(frozen=True, slots=True)
class MemoryDetached:
    """The VMM's memory connection closed: the VMM died."""

    reason: str


@dataclass(frozen=True, slots=True)
class PagerFailedEvent:
    reason: str


PagerEventBody: TypeAlias = (
    MemoryErrorFound | LinkChanged | AllPresent | MemoryAttached | MemoryDetached | PagerFailedEvent
)


@dataclass(frozen=True, slots=True)
class PagerEvent:
    number: int
    at_us: int
    body: PagerEventBody


@dataclass(frozen=True, slots=True)
class PagerStatus:
    """`PagerStatus` in pager.proto, as far as the daemon decides by it."""

    pid: int
    memory_attached: bool
    memory_reason: str
    link_up: bool
    link_reason: str
    all_present: bool
    progress: PageProgress


class Pager(Protocol):
    """One VM's pager process on this host. PAGER_FAILED: it died or cannot be reached; KERNEL_LACKS_FEATURE."""

    @property
    def memory_socket(self) -> Path: ...

    async def status(self) -> PagerStatus: ...
    async def serve_source(self, layout: MemoryLayout, token: str, push_bytes_per_s: int) -> str:
        """Returns the lane address "ip:port". `push_bytes_per_s`: as for `set_push_limit`."""
        ...

    async def list_held(self, layout: MemoryLayout) -> Sequence[PageRange]:
        """Source, its memory attached: what is really held of it, ascending; a hint while the VM runs."""
        ...

    async def set_push_limit(self, push_bytes_per_s: int) -> None:
        """Source: bytes a second of the background push from now on; 0: no limit. Demand is never held back."""
        ...

    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def expect_destination(self, layout: MemoryLayout) -> Sequence[str]:
        """Returns the uffd features that the VMM must ask for."""
        ...

    async def preallocate(self, held: Sequence[PageRange]) -> int:
        """Destination, its memory attached: allocates memory for these pages where the backing allows it (memfd).

        Returns the bytes for which memory is there. DESTINATION_NO_MEMORY: there is not enough; nothing is lost by it.
        """
        ...

    async def connect_lanes(self, lane_address: str, token: str) -> None: ...
    async def start_push(self) -> None: ...
    async def complete(self) -> int:
        """Returns the number of guarded (poisoned) pages."""
        ...

    async def mark_poisoned(self, errors: Sequence[LedgerEntry]) -> None: ...
    def events(self, after: int) -> AsyncIterator[PagerEvent]: ...
    async def acknowledge(self, up_to: int) -> None: ...
    async def shutdown(self, even_if_guest_dies: bool) -> None: ...


class Pagers(Protocol):
    """Starts and finds pagers. `key` names one move of one VM on one side, e.g. "m1-source"; it names the runtime
    directory, so a restarted daemon finds the pager again."""

    async def start(self, key: str, vm: str, source: bool) -> Pager: ...
    async def find(self, key: str) -> Pager | None: ...
    async def remove(self, key: str) -> None:
        """Ends the pager if it runs and deletes its runtime directory."""
        ...


@dataclass(frozen=True, slots=True)
class IncomingUpdate:
    """What the destination says of a postcopy under way."""

    outcome: Outcome
    progress: PageProgress
    paused_reason: str
    errors: tuple[LedgerEntry, ...]
    lost_reason: str = ""
    """Set when the VM's process died on the destination after it ran there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the destination is to make ready before the VM stands still.

    `lane_address` "ip:port" and `lane_token`: where the source's pager will serve pages; `ledger`: the memory errors
    known so far. `held`: what the source really holds; its memory is there, or the migration refused, before the
    answer.
    """

    vm: str
    layout: MemoryLayout
    vcpus: int
    platform: str
    lane_address: str
    lane_token: str
    ledger: tuple[LedgerEntry, ...] = ()
    held: tuple[PageRange, ...] = ()


class Peer(Protocol):
    """The destination's daemon. DESTINATION_UNREACHABLE, DESTINATION_VERSION, MIGRATION_REFUSED, MIGRATION_RUNNING, or
    the destination's own reason, passed through."""

    async def hello(self, migration: str) -> str:
        """Returns the destination's host name."""
        ...

    async def prepare(self, migration: str, wanted: Wanted) -> None: ...
    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None: ...
    async def start(self, migration: str) -> int:
        """Returns when the vCPUs were told to run, Unix microseconds."""
        ...

    async def refuse(self, migration: str, reason: str) -> None: ...
    async def outcome(self, migration: str) -> tuple[Outcome, str]: ...
    def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]: ...
    async def finish(self, migration: str) -> None: ...
    async def close(self) -> None: ...


class Peers(Protocol):
    def connect(self, address: str) -> Peer: ...


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A durable fact of a migration: `kind` is a `journal.JournalKind`, `data` is JSON-ready."""

    migration: str
    kind: str
    at_us: int
    data: dict[str, object]


class Store(Protocol):
    """Durable state. Every write is on disk when it returns (I4). STORE_FAILED otherwise."""

    # jobs (source side)
    async def save_job(self, job: Job) -> Job:
        """Writes the job under the next revision and returns it so; every revision is kept for watchers."""
        ...

    async def job(self, migration: str) -> Job | None: ...
    async def jobs(self) -> Sequence[Job]: ...
    async def job_revisions(self, after: int, limit: int) -> Sequence[Job]: ...
    # journal (either side)
    async def append_journal(self, entry: JournalEntry) -> None: ...
    async def journal(self, migration: str) -> Sequence[JournalEntry]: ...

    # incoming (destination side)
    async def save_incoming(self, incoming: Incoming) -> None: ...
    async def incoming(self, migration: str) -> Incoming | None: ...
    async def incomings(self) -> Sequence[Incoming]: ...

    # ledger
    async def record_errors(self, vm: str, errors: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Merges by `ledger.merge`; returns the entries that are new or changed."""
        ...

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]: ...
    async def ledger_changes(self, vm: str, after: int, limit: int) -> Sequence[tuple[int, str, LedgerEntry]]:
        """(revision, vm, entry) after a revision, of one VM or, for "", of all."""
        ...
