"""Rounds of vmferry: two daemons that stay, and two VMMs a round, over TCP on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.client.follow import TERMINAL_PHASES, follow_migrations
from vmferry.client.progress import phase_word
from vmferry.demo.admin import AdminError
from vmferry.demo.course import Cast, Course
from vmferry.demo.network import loopback_places
from vmferry.demo.options import GuestShape
from vmferry.demo.processes import processes_of
from vmferry.demo.qemu.guest import QemuCasting, monitors
from vmferry.demo.qemu.program import chosen_qemu
from vmferry.demo.stage import AnyGuest, Host, Stage, until
from vmferry.demo.verdict import problems
from vmferry.units import MIB
from vmferry.v1 import pager_pb2
from vmferry.v1.migrations_pb2 import PHASE_COMPLETED, PHASE_POSTCOPY
from vmferry.v1.pager_pb2_grpc import PagerStub
from vmferry_bench.native import BenchError
from vmferry_bench.plan import Turn
from vmferry_bench.processes import CpuWatch, warm_memory
from vmferry_bench.shape import OURS, Round, Shape, is_warm

WARM_S = 90.0
SETTLE_S = 0.3
"""For the guest to run on after the move, before it is judged."""
AFTER_S = 0.05
"""Between the last page and the reading of the report, as on the other side."""


LAST_PAGE_S = 5.0
"""For the event of a move that is complete."""
UNIX = (("grpc.default_authority", "localhost"),)
"""A unix path is no authority that HTTP/2 servers take."""

During = Callable[[Path], AbstractAsyncContextManager[None]]


def _nothing(_root: Path) -> AbstractAsyncContextManager[None]:
    return nullcontext()


def guest_shape(shape: Shape) -> GuestShape:
    """The guest in the demo's words."""
    return GuestShape(
        shape.memory_mib * MIB, shape.vcpus, shape.backing, shape.workload, shape.write_percent, shape.seed
    )


class OurSide:
    """The two daemons."""

    def __init__(self, stage: Stage, home: Host, away: Host) -> None:
        self._stage = stage
        self._home = home
        self._away = away

    async def move(self, turn: Turn, during: During = _nothing) -> Round:
        """One round of OURS or ADOPTED.

        `during` is given the directory below which all processes have theirs, and entered for the move.

        Raises:
            VmferryError, BenchError: it could not be carried out.
        """
        stage, shape = self._stage, turn.shape
        cast = await self._cast(turn)
        try:
            await until(f"{cast.source.vm} to go through its memory", lambda: _is_warm(cast.source, shape), WARM_S)
            return await self._measure(cast, turn, during)
        finally:
            await _end(stage, cast.source, cast.destination)

    async def _cast(self, turn: Turn) -> Cast:
        """Two reference VMMs, or two QEMUs."""
        stage, vm, shape = self._stage, f"bench-{turn.number}", guest_shape(turn.shape)
        apis = await stage.api(self._home), await stage.api(self._away)
        if turn.side == OURS:
            source = await stage.guest(vm, self._home, "kvm", shape)
            return Cast(source, await stage.guest(vm, self._away, "kvm", None), *apis)
        program = chosen_qemu("")
        if program is None:
            raise BenchError("there is no QEMU")
        casting = await QemuCasting.prepare(stage, program, vm, shape)
        running = await casting.start(self._home, apis[0])
        return Cast(running, await casting.start(self._away, apis[1], incoming=True), *apis)

    async def _measure(self, cast: Cast, turn: Turn, during: During) -> Round:
        shape = turn.shape
        course = Course(cast, idle=shape.workload == "idle")
        course.at_source = await cast.source.admin.report()
        await warm_memory(shape.memory_mib * MIB)
        vmms = [cast.source.process.pid, cast.destination.process.pid]
        watch = CpuWatch(vmms, [pid for pid in processes_of(self._stage.root) if pid not in vmms])
        last_page = asyncio.create_task(_last_page(self._away.directory))
        async with during(self._stage.root):
            watch.start()
            resumed_at, table = await self._follow(course, watch, shape.push_mib_s * MIB)
            last_page_at = await asyncio.wait_for(last_page, LAST_PAGE_S)
        watch.add(processes_of(self._stage.root))
        machinery, vcpu, programs = watch.stop()
        await asyncio.sleep(AFTER_S)
        said = await cast.destination.admin.raw_report()
        evidence = await course.judge(SETTLE_S)
        migration = course.migration
        touch = migration.progress.first_touch
        return Round(
            side=turn.side,
            shape=shape,
            number=turn.number,
            buckets=said["first_touch_buckets"],
            longest_us=said["first_touch_us"]["max"],
            blackout_guest_s=said["blackout_us"] / 1e6,
            blackout_vmm_s=migration.downtime_s,
            total_s=_seconds(migration.end_time) - _seconds(migration.create_time),
            postcopy_s=last_page_at - resumed_at,
            postcopy_bytes=migration.progress.bytes_received,
            machinery_cpu_s=machinery,
            vcpu_cpu_s=vcpu,
            programs_cpu_s=programs,
            wrong_bytes=evidence.at_end.wrong_bytes,
            faults="; ".join(problems(evidence)),
            handler_us={"p50": touch.p50_us, "p90": touch.p90_us, "p99": touch.p99_us, "max": touch.max_us},
            table_bytes_per_page=table / migration.progress.total if table else None,
        )

    async def _follow(self, course: Course, watch: CpuWatch, push_bytes_per_s: int) -> tuple[float, int]:
        """Asks for the migration and follows it to its end; returns when the guest was told to run, seconds since 1970,
        and the bytes of the destination's page table."""
        cast, resumed_at, table = course.cast, 0.0, 0
        name = cast.source.vm
        course.migration = await cast.home.create(name, name, self._away.place.peer, push_bytes_per_s)
        async for update in follow_migrations(cast.home, name):
            course.migration = update
            if update.phase == PHASE_POSTCOPY and not resumed_at:
                resumed_at = _seconds(update.update_time)
                watch.add(processes_of(self._stage.root))
                table = max((path.stat().st_size for path in self._away.directory.glob("run/vms/*/pages")), default=0)
            if update.phase in TERMINAL_PHASES:
                break
        if course.migration.phase != PHASE_COMPLETED:
            raise BenchError(f"{name} is {phase_word(course.migration)}: {course.migration.reason}")
        return resumed_at, table


def _pager_sockets(host: Path) -> list[Path]:
    return list(host.glob("run/vms/*/pager.sock"))


async def _last_page(host: Path) -> float:
    """When the destination's pager had the last page, seconds since 1970, by its own event. It ends soon after:
    where that is seen first, then, which is later."""

    async def runs() -> bool:
        return bool(_pager_sockets(host))

    await until("the destination's pager", runs, WARM_S)
    async with grpc.aio.insecure_channel(f"unix:{_pager_sockets(host)[0]}", options=UNIX) as channel:
        call = PagerStub(channel).WatchEvents(pager_pb2.WatchEventsRequest(), wait_for_ready=True)
        try:
            async for event in call:
                if event.WhichOneof("event") == "all_present":
                    return float(event.at_us) / 1e6
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
    return time.time()


async def _is_warm(guest: AnyGuest, shape: Shape) -> bool:
    try:
        said = await guest.admin.raw_report()
    except AdminError:
        if not guest.process.alive:
            raise
        return False
    return is_warm(shape, said)


def _seconds(stamp: Timestamp) -> float:
    return float(stamp.seconds + stamp.nanos / 1e9)


async def _end(stage: Stage, *guests: AnyGuest) -> None:
    """Their memory is needed for the next round."""
    for guest in guests:
        await guest.admin.close()
        await guest.process.kill()
        stage.guests.remove(guest)


@asynccontextmanager
async def our_side() -> AsyncIterator[OurSide]:
    """The daemons, for as many rounds as wanted."""
    places = dict(zip(("home", "away"), loopback_places(2), strict=True))
    async with Stage() as stage:
        home, away = [await stage.host(name, place, qemu=monitors(stage, name)) for name, place in places.items()]
        yield OurSide(stage, home, away)
