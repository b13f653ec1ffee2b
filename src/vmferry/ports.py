"""The ports of the migration core. The adapters (`vmm`, `pager`, `peer`, `store`) implement these Protocols and do not
know each other. `testing/` has a fake of each; the contract tests run both.

Every method is safe to repeat. Every method may raise `VmferryError`; a docstring names the reasons that callers plan
for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vmferry.model.facts import Event, HostFacts
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.journal import JournalEntry
from vmferry.model.memory import MemoryLayout, MemoryRoom, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Incoming, Job, Outcome
from vmferry.model.pager import PagerEvent, PagerHealth, PagerStatus
from vmferry.model.totals import Totals
from vmferry.model.vmm import VmmIdentity


class Clock(Protocol):
    """The clocks. `now_us` is Unix microseconds; `monotonic_s` never decreases."""

    def now_us(self) -> int: ...
    def monotonic_s(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class Processors(Protocol):
    """This host's CPUs. An idle CPU takes tens of microseconds to wake, and the threads of a switchover wake each other
    about thirty times in sequence.
    """

    def keep_awake(self, who: str) -> None:
        """Keeps the CPUs out of idle states until `let_sleep`, for at most a second."""

    def let_sleep(self, who: str) -> None:
        """Ends one request. The CPUs stay awake while another request lasts."""


class MemoryRooms(Protocol):
    """The limits on memory of this host, by the size of a page in bytes. A limit that cannot be read is none."""

    def of_host(self, page_size: int) -> Sequence[MemoryRoom]: ...
    def of_process(self, pid: int, page_size: int) -> Sequence[MemoryRoom]:
        """The limits on pages that the process touches first."""
        ...


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
        """Waits until the connection ends; returns the reason."""
        ...


class Vmms(Protocol):
    """The VMMs connected to this daemon. A move within the host connects two of one VM: one runs and one waits.

    `running` finds a VMM in state running or stopped, a running one first. `incoming` finds one in state incoming,
    prepared or loaded. Neither finds a connection that has ended; the VMM's next connection is a new `Vmm` with the
    same pid.
    """

    def running(self, vm: str) -> Vmm | None: ...
    def incoming(self, vm: str) -> Vmm | None: ...
    def all(self) -> Sequence[Vmm]: ...


class VmmStarter(Protocol):
    """Starts VMMs on this host for VMs that come."""

    async def start(self, vm: str, platform: str) -> None:
        """Returns once a VMM waits for the VM, or at once where this host starts none.

        Raises: VmferryError DESTINATION_NO_VMM with the reason of the failure.
        """
        ...


class Pager(Protocol):
    """The pager process of one VM on this host. PAGER_FAILED: it died or cannot be reached; KERNEL_LACKS_FEATURE."""

    @property
    def memory_socket(self) -> Path: ...

    async def status(self) -> PagerStatus: ...
    async def serve_source(self, layout: MemoryLayout, token: str, push_bytes_per_s: int) -> str:
        """Returns the lane address "ip:port". `push_bytes_per_s` is that of `set_push_limit`."""
        ...

    async def list_held(self, layout: MemoryLayout) -> Sequence[PageRange]:
        """Source, memory attached: the ranges that are really held, ascending. A hint while the VM runs."""
        ...

    async def set_push_limit(self, push_bytes_per_s: int) -> None:
        """Source: limits the background push, bytes per second; 0: no limit. Demand is never delayed."""
        ...

    async def freeze(self) -> None: ...
    async def thaw(self) -> None: ...
    async def expect_destination(self, layout: MemoryLayout) -> Sequence[str]:
        """Returns the uffd features that the VMM must enable."""
        ...

    async def preallocate(self, held: Sequence[PageRange]) -> int:
        """Destination, memory attached: allocates memory for these pages where the backing allows it (memfd).

        Returns the allocated bytes. DESTINATION_NO_MEMORY: the host has too little, and nothing is lost.
        """
        ...

    async def connect_lanes(self, lane_address: str, token: str) -> None: ...
    async def start_push(self) -> None: ...
    async def complete(self) -> int:
        """Returns the number of guarded (poisoned) pages."""
        ...

    async def mark_poisoned(self, errors: Sequence[LedgerEntry]) -> None: ...
    async def forget_replaced(self) -> int:
        """Destination: the guest was reset. Returns the number of poisoned pages that the VMM had replaced; they come
        as `PagesReplaced`, and are poison no longer.
        """
        ...

    def events(self, after: int) -> AsyncIterator[PagerEvent]: ...
    async def acknowledge(self, up_to: int) -> None: ...
    async def shutdown(self, even_if_guest_dies: bool) -> None: ...


class Pagers(Protocol):
    """Starts and finds pagers. `key` names one side of one migration, e.g. "m1-source". It also names the runtime
    directory, so a restarted daemon finds the pager again.
    """

    async def start(self, key: str, vm: str, source: bool) -> Pager: ...
    async def find(self, key: str) -> Pager | None: ...
    def health(self, key: str) -> PagerHealth | None:
        """The process of a pager that was started or found, also after it died. None: there is none, or it was removed
        on purpose.
        """
        ...

    async def remove(self, key: str) -> None:
        """Ends the pager if it runs and deletes its runtime directory."""
        ...


class Peer(Protocol):
    """The destination's daemon. It raises DESTINATION_UNREACHABLE, DESTINATION_VERSION, MIGRATION_REFUSED,
    MIGRATION_RUNNING, or the destination's own reason.
    """

    async def hello(self, migration: str) -> str:
        """Returns the destination's host name."""
        ...

    async def prepare(self, migration: str, wanted: Wanted) -> None: ...
    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None: ...
    async def start(self, migration: str) -> int:
        """Returns the time at which the vCPUs started, Unix microseconds."""
        ...

    async def refuse(self, migration: str, reason: str) -> None: ...
    async def outcome(self, migration: str) -> tuple[Outcome, str]: ...
    def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]: ...
    async def finish(self, migration: str) -> None: ...
    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]:
        """Tells this host's facts. Returns the other host's, with its events after number `heard`, and the highest
        number of this host's events that it has.
        """
        ...

    async def close(self) -> None: ...


class Peers(Protocol):
    def connect(self, address: str, job: str) -> Peer:
        """Returns the peer as the job with this nonce sees it."""
        ...


class Store(Protocol):
    """Durable state. Every write is on disk when it returns (I4). STORE_FAILED otherwise."""

    # jobs (source side)
    async def save_job(self, job: Job) -> Job:
        """Writes the job under the next revision and returns it. Every revision is kept for watchers."""
        ...

    async def job(self, migration: str) -> Job | None: ...
    async def jobs(self) -> Sequence[Job]:
        """In the order of their creation, at any setting of the clock."""
        ...

    async def job_revisions(self, after: int, limit: int) -> Sequence[Job]: ...
    # journal (either side)
    async def reserve(self, key: str) -> None:
        """Makes one small write durable and keeps the store for this process's writes, until `release` or a limit of
        time. A later journal entry of the migration waits for no other process, and needs no space on the disk.
        """
        ...

    def release(self, key: str) -> None: ...
    async def append_journal(self, entry: JournalEntry) -> None: ...
    async def journal(self, migration: str) -> Sequence[JournalEntry]: ...

    # incoming (destination side)
    async def save_incoming(self, incoming: Incoming) -> None: ...
    async def incoming(self, migration: str) -> Incoming | None: ...
    async def incomings(self) -> Sequence[Incoming]:
        """In the order of their arrival."""
        ...

    async def incoming_journals(self) -> Mapping[str, Sequence[JournalEntry]]:
        """The journals of all incoming migrations, by migration, read at once."""
        ...

    # events of both hosts, for people
    async def add_events(self, events: Sequence[tuple[str, Event]]) -> None:
        """Writes (migration, event). Known ones are left out. It waits while the store is reserved."""
        ...

    async def events(self, migration: str) -> Sequence[Event]: ...
    async def newest_events(self, limit: int) -> Sequence[tuple[str, Event]]:
        """(migration, event), the newest first."""
        ...

    # history
    async def totals(self) -> Totals:
        """The counts of all migrations that have ended. A save that ends one adds it."""
        ...

    async def forget(self, jobs: Sequence[str], incomings: Sequence[str]) -> None:
        """Deletes ended migrations, with their revisions, and with journal and events if no other side has the id."""
        ...

    # ledger
    async def record_errors(self, vm: str, errors: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Merges by `ledger.merge`; returns the entries that are new or changed."""
        ...

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]: ...
    async def ledger_changes(self, vm: str, after: int, limit: int) -> Sequence[tuple[int, str, LedgerEntry]]:
        """(revision, vm, entry) after a revision, of one VM, or of all for ""."""
        ...

    async def life(self, vm: str) -> str:
        """The process that is the VM, as `begin_life` named it; "": unknown."""
        ...

    async def begin_life(self, vm: str, life: str, keeps_ledger: bool) -> None:
        """The VM is this process from now on. Without `keeps_ledger` its ledger is empty: older entries are history."""
        ...
