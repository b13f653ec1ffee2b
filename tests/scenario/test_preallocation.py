"""Memory that the source holds is there on the destination before the VM moves, where the backing allows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.scenario.harness import SOON_S, Pair, cast, ended, reaches, report, shape, two_hosts
from vmferry.demo.course import Course
from vmferry.demo.options import PAYLOAD_BYTES
from vmferry.demo.stage import Guest, until
from vmferry.demo.verdict import problems
from vmferry.units import MIB, PAGE_4K
from vmferry.v1 import migrations_pb2
from vmferry.v1.common_pb2 import PageProgress

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

MEMORY = 144 * MIB
HELD = MEMORY - PAYLOAD_BYTES
"""What the workload has filled; of the payload's own memory only a part is held."""
BLOCK = 512
"""Unit of st_blocks, bytes (stat(2))."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def slow(programs, uffd_poison):
    """Two hosts; a push of a page a second leaves time to look at memory that has not arrived."""
    async with two_hosts({"pager": f"push_bytes_per_s = {PAGE_4K}"}) as pair:
        yield pair
        await pair.stage.dismiss_guests()


def allocated(guest: Guest) -> int:
    """Bytes of the host's memory behind the guest's memfds."""
    found: dict[int, int] = {}
    for entry in Path(f"/proc/{guest.process.pid}/fd").iterdir():
        if str(entry.readlink()).startswith("/memfd:guest-memory"):
            seen = entry.stat()
            found[seen.st_ino] = seen.st_blocks * BLOCK
    assert found, "the guest has no memfd"
    return sum(found.values())


async def progress(pair: Pair, vm: str) -> PageProgress:
    """As the destination's pager says it; waited for, since the first look may come before its first word."""
    last = PageProgress()

    async def known() -> bool:
        nonlocal last
        last = (await pair.away_api.machine(vm)).progress
        return last.total > 0

    await until("the destination's progress", known, SOON_S)
    return last


def preallocated(pair: Pair, migration: str) -> list[int]:
    """As the destination's daemon logged it."""
    log = pair.stage.root / f"{pair.away.name}.daemon.log"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [
        line["bytes"] for line in lines if line["event"] == "incoming.preallocated" and line["migration"] == migration
    ]


async def test_a_memfd_is_allocated_before_its_pages_arrive(slow: Pair, vm):
    players = await cast(slow, vm, "process", shape(MEMORY, workload="idle", backing="memfd"))
    course = Course(players, idle=True)
    course.at_source = await report(players.source)
    await slow.home_api.create(vm, vm, slow.away.place.peer)
    await reaches(slow.home_api, vm, migrations_pb2.PHASE_POSTCOPY)
    assert allocated(players.destination) >= HELD
    assert (await progress(slow, vm)).absent * PAGE_4K > MEMORY // 2, "most of it has not arrived"
    (logged,) = preallocated(slow, vm)
    assert HELD <= logged <= MEMORY
    await slow.home_api.set_push_limit(vm, 0)
    course.migration = await ended(slow.home_api, vm)
    assert problems(await course.judge(SOON_S)) == []
