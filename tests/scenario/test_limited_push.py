"""The background push keeps its limit, over a restart of the source's daemon too; demand knows none.

The speed of this machine decides nothing: the asserted bounds hold on a slow machine as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support.scenario.harness import SOON_S, Pair, cast, ended, goes_on, reaches, report, shape, two_hosts
from vmferry.client.refusal import RefusedError
from vmferry.demo.course import Course
from vmferry.demo.patience import patient
from vmferry.demo.stage import until
from vmferry.demo.verdict import problems
from vmferry.units import MIB, PAGE_4K
from vmferry.v1 import migrations_pb2
from vmferry.v1.migrations_pb2 import Migration

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

MEMORY = 144 * MIB
"""128 MiB of it are the workload's and have contents."""
LIMIT = MIB
BURST = 24 * MIB
"""Bytes that may go at once under any limit: the buffers of connections and pagers."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def limited(programs, uffd_poison):
    """Two hosts; the first limits every push to a page a second by its configuration."""
    async with two_hosts({"pager": f"push_bytes_per_s = {PAGE_4K}"}) as pair:
        yield pair
        await pair.stage.dismiss_guests()


@dataclass
class Clock:
    """Since before the migration was asked for."""

    began_s: float

    def allows(self, limit: int) -> float:
        """Bytes that the push may have sent by now."""
        return BURST + limit * (time.monotonic() - self.began_s)


async def pushed(pair: Pair, vm: str) -> Migration:
    """The migration once the push has brought something."""
    last = Migration()

    async def some() -> bool:
        nonlocal last
        last = await pair.home_api.migration(vm)
        return last.progress.push > 0

    await until("the first pushed page", some, SOON_S)
    return last


async def test_a_limited_push_is_slow_until_the_limit_is_lifted(limited: Pair, vm):
    players = await cast(limited, vm, "process", shape(MEMORY, workload="idle"))
    course = Course(players, idle=True)
    course.at_source = await report(players.source)
    clock = Clock(time.monotonic())
    made = await limited.home_api.create(vm, vm, limited.away.place.peer, LIMIT)
    assert made.push_bytes_per_s == LIMIT, "its own limit comes before the configured one"
    await reaches(limited.home_api, vm, migrations_pb2.PHASE_POSTCOPY)
    first = await pushed(limited, vm)
    assert first.progress.push * PAGE_4K <= clock.allows(LIMIT)

    await limited.home.kill()
    await limited.home.start()
    assert (await limited.home_api.migration(vm)).push_bytes_per_s == LIMIT

    async def more() -> bool:
        now = await limited.home_api.migration(vm)
        assert now.progress.push * PAGE_4K <= clock.allows(LIMIT)
        assert now.phase == migrations_pb2.PHASE_POSTCOPY
        return now.progress.push > first.progress.push

    await until("the push to go on under its limit", more, SOON_S)
    changed = await limited.home_api.set_push_limit(vm, 0)
    assert changed.push_bytes_per_s == 0
    course.migration = await ended(limited.home_api, vm)
    assert course.migration.progress.push * PAGE_4K > MEMORY // 2
    assert problems(await course.judge(SOON_S)) == []
    with pytest.raises(RefusedError) as refused:
        await limited.home_api.set_push_limit(vm, LIMIT)
    assert refused.value.reason == "MIGRATION_ENDED"


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
async def test_demand_is_not_held_back(limited: Pair, vm, backing):
    """At a page a second for the push, a guest that touches all of its memory fetches it by itself."""
    players = await cast(limited, vm, "process", shape(MEMORY, workload="sequential", backing=backing))
    course = Course(players)
    course.at_source = await report(players.source)
    clock = Clock(time.monotonic())
    made = await limited.home_api.create(vm, vm, limited.away.place.peer)
    assert made.push_bytes_per_s == PAGE_4K, "as configured"
    await reaches(limited.home_api, vm, migrations_pb2.PHASE_POSTCOPY)
    await goes_on(players.destination)

    async def everywhere() -> bool:
        seen = await report(players.destination)
        assert seen.wrong_bytes == 0
        return seen.passes > 0 and seen.pages_touched_here * PAGE_4K >= MEMORY // 2

    await until("the guest to touch its memory", everywhere, patient(60.0))
    now = (await limited.home_api.migration(vm)).progress
    assert now.push * PAGE_4K <= clock.allows(PAGE_4K)
    assert now.demand > now.push
    await limited.home_api.set_push_limit(vm, 0)
    course.migration = await ended(limited.home_api, vm)
    assert problems(await course.judge(SOON_S)) == []
