"""A guest moves over networks of all kinds: conditions and outcomes as a table; the guest is the judge.

The rows of `make test` are those that end soon; `make test-network` plays them all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support.network.disturbances import Hole, stalls
from tests.support.network.emulator import CLEAN, Conditions
from tests.support.network.figures import Figures
from tests.support.network.hosts import MEMORY, Disturbance, NetworkPair, cast, move, two_far_hosts
from tests.support.scenario.harness import goes_on
from vmferry.client.progress import phase_word
from vmferry.demo.course import Course
from vmferry.demo.patience import patient
from vmferry.demo.verdict import problems
from vmferry.units import MIB

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SETTLE_S = patient(20.0)
SLOW_PUSH = 2 * MIB
"""Bytes a second: most pages are absent still when the guest has run for a while."""
SLOW_DEMAND = Conditions(delay_ms=5)


@dataclass(frozen=True, slots=True)
class Row:
    """`limit`: bytes a second of the push; 0 for none."""

    conditions: Conditions
    disturb: Disturbance | None = None
    limit: int = 0
    memory: int = MEMORY
    backing: str = "memfd"


def rtt(milliseconds: float) -> Row:
    return Row(Conditions(delay_ms=milliseconds / 2))


def hole(seconds: float, direction: str = "both") -> Row:
    return Row(SLOW_DEMAND, Hole(seconds, SLOW_DEMAND, direction), SLOW_PUSH)


SHORT = {
    "rtt-0": Row(CLEAN),
    "rtt-10": rtt(10),
    "rtt-100": rtt(100),
    "stalls-of-the-source": Row(CLEAN, stalls("home")),
    "stalls-of-the-destination": Row(CLEAN, stalls("away")),
    "hole-3s": hole(3),
}
LONG = {
    "rtt-50": rtt(50),
    "rtt-300": rtt(300),
    "rtt-10-anonymous": Row(Conditions(delay_ms=5), backing="anonymous"),
    "jitter": Row(Conditions(delay_ms=5, jitter_ms=10)),
    "loss-1": Row(Conditions(delay_ms=0.5, loss_percent=1)),
    "loss-1-rtt-50": Row(Conditions(delay_ms=25, loss_percent=1), memory=32 * MIB),
    "reorder-5": Row(Conditions(delay_ms=2, reorder_percent=5)),
    "mbit-100-queue-50": Row(Conditions(delay_ms=0.5, rate_mbit=100, queue_ms=50)),
    "mbit-100-queue-500": Row(Conditions(delay_ms=0.5, rate_mbit=100, queue_ms=500)),
    "rtt-300-stalls": Row(Conditions(delay_ms=150), stalls("away")),
    "hole-8s": hole(8),
    "hole-8s-answers": hole(8, "ab"),
    "hole-8s-requests": hole(8, "ba"),
}


def rows() -> list[object]:
    long = [pytest.param(name, row, id=name, marks=pytest.mark.long) for name, row in LONG.items()]
    return [pytest.param(name, row, id=name) for name, row in SHORT.items()] + long


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hosts(emulator_program, programs, uffd_poison) -> AsyncIterator[NetworkPair]:
    async with two_far_hosts(emulator_program) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def pair(hosts: NetworkPair) -> AsyncIterator[NetworkPair]:
    """The module's hosts; the guests of a test end with it."""
    yield hosts
    await hosts.stage.dismiss_guests()


@pytest.mark.parametrize(("vm", "row"), rows())
async def test_move_ends_well(pair: NetworkPair, figures: Figures, vm: str, row: Row):
    course = Course(await cast(pair, vm, row.memory, row.backing))
    pair.emulator.set(row.conditions)
    moved = await move(pair, course, vm, row.limit, row.disturb)
    figures.add(vm, row.conditions, moved)
    assert problems(await course.judge(SETTLE_S)) == []


async def test_path_that_drops_full_packets_is_found_before_the_vm_stops(pair: NetworkPair):
    """Small packets pass, so calls between daemons do: the pages would be the first that do not."""
    vm = "mtu-hole"
    course = Course(await cast(pair, vm))
    pair.emulator.set(Conditions(largest=1400))
    moved = await move(pair, course, vm)
    assert phase_word(moved) == "FAILED", moved.reason
    assert moved.reason_code == "LINK_DOWN"
    assert "MTU" in moved.reason
    assert (await goes_on(course.cast.source)).wrong_bytes == 0
