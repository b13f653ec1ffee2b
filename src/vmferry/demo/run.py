"""The demo's course: two daemons, two reference VMMs, and a control plane that moves a guest between them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from vmferry.client.api import Api
from vmferry.client.follow import TERMINAL_PHASES, follow_migrations
from vmferry.client.plain import enum_word
from vmferry.client.progress import ProgressView, arrived, phase_word
from vmferry.client.refusal import ApiError
from vmferry.demo.admin import AdminError, GuestReport
from vmferry.demo.network import NamespacePair, Place, loopback_places
from vmferry.demo.options import PAYLOAD_BYTES, DemoOptions, choose_accel
from vmferry.demo.result import DemoResult
from vmferry.demo.stage import Guest, Stage, StageError, until
from vmferry.demo.verdict import Evidence, LedgerPage
from vmferry.units import PAGE_4K
from vmferry.v1 import machines_pb2
from vmferry.v1.common_pb2 import ErrorOrigin, MemoryLayout
from vmferry.v1.migrations_pb2 import PHASE_POSTCOPY, Migration

VM = "demo"
SETTLE_S = 60.0
"""For the guest to touch every page once more; a guest without pauses needs about a second."""
SOURCE_ENDS_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Cast:
    """The guest's two VMMs and the APIs of their hosts."""

    source: Guest
    destination: Guest
    home: Api
    away: Api


@dataclass(slots=True)
class _Seen:
    """Filled in while the migration goes on."""

    migration: Migration = field(default_factory=Migration)
    at_source: GuestReport = field(default_factory=GuestReport)
    turned_bad: frozenset[int] = frozenset()


async def perform(options: DemoOptions, progress: Console, say: Say) -> DemoResult:
    """Runs it.

    Raises:
        VmferryError, ApiError: the stage did not come up, or the migration was refused; logs are kept.
    """
    accel, words = choose_accel(options.accel)
    if words:
        say(words)
    namespaces = NamespacePair()
    why = await namespaces.make()
    if why:
        say(f"No network namespaces here ({why}): both hosts are on loopback.")
    stage = Stage(options.keep)
    try:
        if not why:
            namespaces.enter()
        places = loopback_places() if why else namespaces.places()
        async with asyncio.timeout(options.time_limit_s), stage:
            result = await _Play(options, accel, stage, say).perform(places, progress)
            stage.kept = options.keep or not result.ok
    except TimeoutError:
        raise StageError(f"not done within {options.time_limit_s:g} s", f"Logs: {stage.root}") from None
    except (ApiError, StageError, AdminError) as error:
        error.remedy = f"{error.remedy} Logs: {stage.root}".strip()
        raise
    except asyncio.CancelledError:
        say(f"Interrupted. Logs: {stage.root}")
        raise
    finally:
        await asyncio.shield(asyncio.ensure_future(namespaces.remove()))
    return DemoResult(
        accel,
        "loopback" if why else "namespaces",
        result.migration,
        result.evidence,
        result.found_by,
        str(stage.root) if stage.kept else "",
    )


class _Play:
    """One run on a stage that is empty."""

    def __init__(self, options: DemoOptions, accel: str, stage: Stage, say: Say) -> None:
        self._options = options
        self._accel = accel
        self._stage = stage
        self._say = say
        self._random = random.Random(options.shape.seed)  # which pages go bad need not be secret

    async def perform(self, places: Sequence[Place], progress: Console) -> DemoResult:
        options, stage = self._options, self._stage
        shape = options.shape
        self._say(f"Two daemons start on {places[0].peer} and {places[1].peer}.")
        home, away = await asyncio.gather(stage.host("source", places[0]), stage.host("destination", places[1]))
        source, destination = await asyncio.gather(
            stage.guest(VM, home, self._accel, shape), stage.guest(VM, away, self._accel, None)
        )
        self._say(f"A guest runs: {self._accel}, {shape.memory >> 20} MiB, {shape.vcpus} vCPUs, {shape.workload}.")
        cast = _Cast(source, destination, await stage.api(home), await stage.api(away))
        await stage.warm(source, within_s=SETTLE_S)
        before, during = self._pages((await cast.home.machine(VM)).layout)
        await self._poison_before(source, before)
        seen = _Seen(at_source=await source.admin.report())
        migration = seen.migration = await cast.home.create("demo", VM, places[1].peer)
        with ProgressView(progress) as view:
            await self._follow(cast, migration.migration_id, during, view, seen)
        evidence, found_by = await self._judge(cast, seen, before)
        return DemoResult(self._accel, "", seen.migration, evidence, found_by)

    def _pages(self, layout: MemoryLayout) -> tuple[list[int], list[int]]:
        """GPAs of the pages to go bad: any but the payload's, each once."""
        pages = [
            gpa
            for region in layout.regions
            for gpa in range(max(region.gpa, PAYLOAD_BYTES), region.gpa + region.size, PAGE_4K)
        ]
        wanted = self._options.poison_before + self._options.poison_during
        if wanted > len(pages):
            raise StageError(f"{wanted} pages to poison, the guest has {len(pages)}", "Give it more --memory.")
        chosen = self._random.sample(pages, wanted)
        return chosen[: self._options.poison_before], chosen[self._options.poison_before :]

    async def _poison_before(self, source: Guest, pages: Sequence[int]) -> None:
        """Every other one is told to the daemon, the rest is only found by reading."""
        refused = await source.admin.inject([(gpa, index % 2 == 0) for index, gpa in enumerate(pages)])
        for gpa, why in zip(pages, refused, strict=True):
            if why:
                raise StageError(f"no memory error could be made at {gpa:#x}: {why}")
        told = (len(pages) + 1) // 2
        self._say(f"{len(pages)} pages are poisoned: the daemon is told of {told}, the others it has to find.")

    async def _follow(
        self, cast: _Cast, migration_id: str, during: Sequence[int], view: ProgressView, seen: _Seen
    ) -> None:
        async for update in follow_migrations(cast.home, migration_id):
            if update.phase == PHASE_POSTCOPY and not seen.turned_bad and during:
                seen.turned_bad = await self._turn_bad(cast.source, during)
            if update.phase not in TERMINAL_PHASES:
                seen.at_source = await _report_or(cast.source, seen.at_source)
            seen.migration = update
            view.show(update)

    async def _turn_bad(self, source: Guest, pages: Sequence[int]) -> frozenset[int]:
        """Those that did: a source that has been let go of already has no memory to go bad."""
        try:
            refused = await source.admin.inject([(gpa, index % 2 == 0) for index, gpa in enumerate(pages)])
        except AdminError as error:
            self._say(f"The source was gone before pages could turn bad: {error.message}")
            return frozenset()
        return frozenset(gpa for gpa, why in zip(pages, refused, strict=True) if not why)

    async def _judge(self, cast: _Cast, seen: _Seen, before: Sequence[int]) -> tuple[Evidence, dict[str, int]]:
        source, destination = cast.source, cast.destination
        arrival = await _report_or(destination, GuestReport())
        end = await self._settle(destination, arrival)
        await source.process.ended(SOURCE_ENDS_S)
        errors = [error async for error in cast.away.memory_errors(VM)]
        migration = seen.migration
        evidence = Evidence(
            phase=phase_word(migration),
            reason=f"{migration.reason_code} {migration.reason}".strip(),
            poisoned_before=frozenset(before),
            poisoned_during=seen.turned_bad,
            at_source=seen.at_source,
            at_arrival=arrival,
            at_end=end,
            ledger=tuple(LedgerPage(error.gpa, error.guest_visible) for error in errors),
            poison_pages=migration.progress.poison,
            pages_total=migration.progress.total,
            pages_arrived=arrived(migration),
            source_running=source.process.alive or await _runs(cast.home),
            idle=self._options.shape.workload == "idle",
        )
        return evidence, dict(Counter(enum_word(ErrorOrigin.DESCRIPTOR, error.origin).lower() for error in errors))

    async def _settle(self, guest: Guest, first: GuestReport) -> GuestReport:
        """Lets the guest go through all of its memory once more, if it does so in time; the last it said."""
        last = first
        if self._options.shape.workload == "idle":
            return await _report_or(guest, last)

        async def again() -> bool:
            nonlocal last
            last = await _report_or(guest, last)
            # The pass that was under way when the guest arrived does not count: hence two.
            return last.passes >= first.passes + 2 or not guest.process.alive

        try:
            await until("the guest to touch every page again", again, SETTLE_S)
        except StageError:
            self._say(f"The guest made {last.passes - first.passes} passes within {SETTLE_S:g} s; two were hoped for.")
        return last


async def _report_or(guest: Guest, otherwise: GuestReport) -> GuestReport:
    """The guest's report, or the one before if the VMM is gone."""
    try:
        return await guest.admin.report()
    except AdminError:
        return otherwise


async def _runs(api: Api) -> bool:
    """Whether the source's daemon still knows a running VM of that name."""
    try:
        machine = await api.machine(VM)
    except ApiError:
        return False
    return bool(machine.state in (machines_pb2.MACHINE_STATE_RUNNING, machines_pb2.MACHINE_STATE_MIGRATING_OUT))
