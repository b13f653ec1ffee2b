"""Two daemons, each in a namespace of its own, and a guest that moves from one to the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.network.emulator import ADDRESSES, CLEAN, Emulator
from tests.support.network.namespaces import Relay, two_namespaces
from vmferry.client.api import Api
from vmferry.client.follow import TERMINAL_PHASES, follow_migrations
from vmferry.client.refusal import RefusedError
from vmferry.demo.course import Cast, Course, report_or
from vmferry.demo.network import Place, loopback_places
from vmferry.demo.options import GuestShape
from vmferry.demo.patience import patient
from vmferry.demo.stage import Host, Stage
from vmferry.units import MIB
from vmferry.v1.migrations_pb2 import PHASE_POSTCOPY, Migration

MEMORY = 40 * MIB
"""16 MiB of it are the payload's, mostly zeros; the rest has contents."""
WITHIN_S = patient(90.0)
"""For a migration, on the slowest network of all."""
API_TIMEOUT_S = patient(30.0)
"""A daemon may be stopped for a while."""


@dataclass(frozen=True, slots=True)
class EmulatedPlace(Place):
    """Peers and pages go over the emulated network; the API is on loopback, where a `Relay` reaches it."""

    @property
    def api(self) -> str:
        return f"127.0.0.1:{self.api_port}"


@dataclass(frozen=True, slots=True)
class NetworkPair:
    """Two hosts, their APIs, and the network between them: the source is its end "a"."""

    emulator: Emulator
    stage: Stage
    home: Host
    away: Host
    home_api: Api
    away_api: Api


@asynccontextmanager
async def two_far_hosts(program: Path, **config: str) -> AsyncIterator[NetworkPair]:
    """Two daemons with further lines of configuration by section; the network is clean, and exceeds no blackout."""
    config = {**config, "timeouts": f"downtime_s = 60.0\n{config.get('timeouts', '')}".strip()}
    async with AsyncExitStack() as stack:
        names = stack.enter_context(two_namespaces())
        emulator = Emulator(program, names)
        stack.callback(emulator.stop)
        places = []
        for free, ip, name in zip(loopback_places(2), ADDRESSES, names, strict=True):
            place = EmulatedPlace(ip, name, free.api_port, free.peer_port, free.ops_port, free.first_page_port)
            places.append(place)
            relay = Relay(name, place.api_port)
            await relay.start()
            stack.push_async_callback(relay.stop)
        stage = await stack.enter_async_context(Stage())
        home, away = await asyncio.gather(
            stage.host("home", places[0], **config), stage.host("away", places[1], **config)
        )
        home_api, away_api = [await stage.api(host, API_TIMEOUT_S) for host in (home, away)]
        yield NetworkPair(emulator, stage, home, away, home_api, away_api)


async def cast(pair: NetworkPair, vm: str, memory: int = MEMORY, backing: str = "memfd") -> Cast:
    """A guest that has been through all of its memory, and a VMM that waits for it. It is threads of a process:
    the test is about the network."""
    shape = GuestShape(memory=memory, vcpus=2, backing=backing, workload="random")
    source, destination = await asyncio.gather(
        pair.stage.guest(vm, pair.home, "process", shape), pair.stage.guest(vm, pair.away, "process", None)
    )
    await pair.stage.warm(source)
    return Cast(source, destination, pair.home_api, pair.away_api)


Disturbance = Callable[[NetworkPair, Course], Awaitable[None]]
"""Something that happens to the hosts or the network during a move; cancelled at its end."""


async def move(
    pair: NetworkPair,
    course: Course,
    vm: str,
    limit: int = 0,
    disturb: Disturbance | None = None,
    *,
    within_s: float = WITHIN_S,
) -> Migration:
    """Moves the guest while the disturbance runs, and leaves the network clean. The migration as it is at its end, or
    after `within_s`."""
    course.at_source = await course.cast.source.admin.report()
    disturbing = asyncio.create_task(disturb(pair, course)) if disturb else None
    try:
        course.migration = await pair.home_api.create(vm, vm, pair.away.place.peer, limit)
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await _follow(pair, course, vm)
        if disturbing is not None and disturbing.done():
            disturbing.result()
    finally:
        if disturbing is not None:
            disturbing.cancel()
            with suppress(asyncio.CancelledError):
                await disturbing
        pair.emulator.set(CLEAN)
    return course.migration


async def _follow(pair: NetworkPair, course: Course, vm: str) -> None:
    async for update in follow_migrations(pair.home_api, vm):
        course.migration = update
        if update.phase not in TERMINAL_PHASES:
            course.at_source = await report_or(course.cast.source, course.at_source)


async def in_postcopy(pair: NetworkPair, vm: str) -> None:
    """Waits until the migration is asked for, the guest runs on the destination and pages are absent there."""
    while True:
        with suppress(RefusedError):
            async for update in follow_migrations(pair.home_api, vm):
                if update.phase == PHASE_POSTCOPY and update.progress.absent > 0:
                    return
            raise AssertionError("the migration ended before anything could happen to it")
        await asyncio.sleep(0.02)
