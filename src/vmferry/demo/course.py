"""One move of a guest and its evidence, for the demo and the scenario tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmferry.client.api import Api
from vmferry.client.follow import TERMINAL_PHASES, follow_migrations
from vmferry.client.progress import arrived, phase_word
from vmferry.client.refusal import ApiError
from vmferry.demo.admin import AdminError, GuestReport, Mapped
from vmferry.demo.options import PAYLOAD_BYTES
from vmferry.demo.patience import patient
from vmferry.demo.stage import AnyGuest, StageError, until
from vmferry.demo.verdict import Evidence, LedgerPage
from vmferry.units import PAGE_4K
from vmferry.v1 import machines_pb2
from vmferry.v1.common_pb2 import MemoryError as LedgerError
from vmferry.v1.common_pb2 import MemoryLayout
from vmferry.v1.migrations_pb2 import PHASE_COMPLETED, PHASE_POSTCOPY, Migration

SETTLE_S = patient(30.0)
"""Time for the guest to touch every page once more. A guest without pauses needs a second or two."""
SOURCE_ENDS_S = patient(10.0)
LEDGER_S = patient(60.0)
"""Time for the ledger to record the errors that the pager reported to the guest. Each error is a write of its own."""

Page = tuple[int, bool]
"""The GPA of a page that goes bad, and whether the daemon is told."""


@dataclass(frozen=True, slots=True)
class Cast:
    """The guest's two VMMs and the APIs of their hosts."""

    source: AnyGuest
    destination: AnyGuest
    home: Api
    away: Api


def workload_pages(layout: MemoryLayout) -> list[int]:
    """The GPAs of the 4 KiB pages that the guest touches: all but the payload's."""
    return [
        gpa
        for region in layout.regions
        for gpa in range(max(region.gpa, PAYLOAD_BYTES), region.gpa + region.size, PAGE_4K)
    ]


def pages_to_lose(layout: MemoryLayout) -> list[int]:
    """The GPAs of the pages that may go bad, in the page size of their backing: those without a byte of the payload."""
    return [
        gpa
        for region in layout.regions
        for gpa in range(region.gpa, region.gpa + region.size, region.page_size)
        if gpa >= PAYLOAD_BYTES
    ]


def lost_with(pages: Sequence[Page], regions: Sequence[Mapped]) -> frozenset[int]:
    """The GPAs of the 4 KiB pages that go bad with these. Each takes the whole page of its backing with it."""
    sizes = {gpa: region.page_size for gpa, _ in pages for region in regions if gpa in region.gpas}
    starts = {gpa - gpa % size: size for gpa, size in sizes.items()}
    return frozenset(gpa for start, size in starts.items() for gpa in range(start, start + size, PAGE_4K))


def largest_page(layout: MemoryLayout) -> int:
    """The bytes of the largest page of any region."""
    return max(region.page_size for region in layout.regions)


class Course:
    """One move. Use `poison_before`, `move` and `judge` in this order.

    `idle`: the guest touches nothing after its first pass. `real_frames`: frames of the host go bad, not only the
    guest's mapping of them. Bad pages are named by GPA, 4 KiB each: a huge page is many of them.
    """

    def __init__(self, cast: Cast, idle: bool = False, real_frames: bool = False) -> None:
        self.cast = cast
        self.migration = Migration()
        self.at_source = GuestReport()
        self.bad_before: frozenset[int] = frozenset()
        self.bad_during: frozenset[int] = frozenset()
        self.ledger: list[LedgerError] = []
        self._idle = idle
        self._real_frames = real_frames

    async def poison_before(self, pages: Sequence[Page]) -> None:
        """Raises:
        StageError: the VMM could not make one of the errors.
        """
        regions = await self.cast.source.admin.regions()
        refused = await self.cast.source.admin.inject(pages, self._real_frames)
        for (gpa, _), why in zip(pages, refused, strict=True):
            if why:
                raise StageError(f"no memory error could be made at {gpa:#x}: {why}")
        self.bad_before |= lost_with(pages, regions)

    async def move(
        self,
        migration_id: str,
        destination: str,
        during: Sequence[Page] = (),
        show: Callable[[Migration], None] = lambda _: None,
    ) -> Migration:
        """Starts the migration and follows it to its end. The pages `during` turn bad on the source in postcopy."""
        cast = self.cast
        self.at_source = await cast.source.admin.report()
        self.migration = await cast.home.create(migration_id, cast.source.vm, destination)
        pending = list(during)
        async for update in follow_migrations(cast.home, migration_id):
            if update.phase == PHASE_POSTCOPY and pending:
                self.bad_during = await self._turn_bad(pending)
                pending = []
            if update.phase not in TERMINAL_PHASES:
                self.at_source = await report_or(cast.source, self.at_source)
            self.migration = update
            show(update)
        return self.migration

    async def _turn_bad(self, pages: Sequence[Page]) -> frozenset[int]:
        """Returns the pages that turned bad. A source that has been released has no memory that could."""
        try:
            regions = await self.cast.source.admin.regions()
            refused = await self.cast.source.admin.inject(pages, self._real_frames)
        except AdminError:
            return frozenset()
        return lost_with([page for page, why in zip(pages, refused, strict=True) if not why], regions)

    async def judge(self, settle_s: float = SETTLE_S) -> Evidence:
        """Lets the guest pass once more through all of its memory, and gathers the evidence."""
        cast, migration = self.cast, self.migration
        arrival = end = await report_or(cast.destination, GuestReport())
        destination_page = PAGE_4K
        if migration.phase == PHASE_COMPLETED:
            end = await self._settle(arrival, settle_s)
            destination_page = largest_page((await cast.away.machine(cast.destination.vm)).layout)
            await cast.source.process.ended(SOURCE_ENDS_S)
        self.ledger = await self._ledger_with({gpa for check in end.machine_checks for gpa in check.pages})
        return Evidence(
            phase=phase_word(migration),
            reason=f"{migration.reason_code} {migration.reason}".strip(),
            poisoned_before=self.bad_before,
            poisoned_during=self.bad_during,
            at_source=self.at_source,
            at_arrival=arrival,
            at_end=end,
            ledger=tuple(LedgerPage(error.gpa, error.guest_visible, error.lsb) for error in self.ledger),
            poison_pages=migration.progress.poison,
            pages_total=migration.progress.total,
            pages_arrived=arrived(migration),
            source_running=cast.source.process.alive or await _runs(cast.home, cast.source.vm),
            idle=self._idle,
            destination_page=destination_page,
        )

    async def _ledger_with(self, told: set[int]) -> list[LedgerError]:
        """The destination's ledger. It waits a while for the 4 KiB pages that were reported to the guest."""
        ledger: list[LedgerError] = []

        async def complete() -> bool:
            nonlocal ledger
            ledger = [error async for error in self.cast.away.memory_errors(self.cast.destination.vm)]
            return told <= {gpa for error in ledger for gpa in LedgerPage(error.gpa, False, error.lsb).pages}

        try:
            await until("the ledger to have what the guest was told of", complete, LEDGER_S)
        except StageError:
            return ledger
        return ledger

    async def _settle(self, first: GuestReport, settle_s: float) -> GuestReport:
        """The guest's last report. A guest that does not finish in time is no fault in itself: the report tells how far
        it came.
        """
        guest = self.cast.destination
        last = await report_or(guest, first)
        machine = await self.cast.away.machine(guest.vm)
        # A page that a vCPU was touching during the move is counted on neither host.
        pages = len(workload_pages(machine.layout)) - machine.vcpus

        async def everywhere() -> bool:
            nonlocal last
            last = await report_or(guest, last)
            known_bad = {gpa for check in last.machine_checks for gpa in check.pages}
            if self._idle:
                return known_bad >= self.bad_before or not guest.process.alive
            done = last.pages_touched_here + len(known_bad) >= pages and last.touches > first.touches
            return done or not guest.process.alive

        try:
            await until("the guest to touch every page again", everywhere, settle_s)
        except StageError:
            return last
        return last


async def report_or(guest: AnyGuest, otherwise: GuestReport) -> GuestReport:
    """The guest's report, or the one before if the VMM is gone."""
    try:
        return await guest.admin.report()
    except AdminError:
        return otherwise


async def _runs(api: Api, vm: str) -> bool:
    """Whether a host's daemon knows a running VM of that name."""
    try:
        machine = await api.machine(vm)
    except ApiError:
        return False
    return bool(machine.state in (machines_pb2.MACHINE_STATE_RUNNING, machines_pb2.MACHINE_STATE_MIGRATING_OUT))
