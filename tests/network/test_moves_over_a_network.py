"""A guest moves over networks of all kinds: conditions and outcomes as a table; the guest is the judge.

The rows of `make test` are those that end soon; `make test-network` plays them all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from math import inf

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
from vmferry.v1.migrations_pb2 import Migration

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SETTLE_S = patient(20.0)
SLOW_PUSH = 2 * MIB
"""Bytes a second: most pages are absent still when the guest has run for a while."""
SLOW_DEMAND = Conditions(delay_ms=5)


@dataclass(frozen=True, slots=True)
class Row:
    """`limit`: bytes a second of the push; 0 for none. `within_s`: for the move."""

    conditions: Conditions
    disturb: Disturbance | None = None
    limit: int = 0
    memory: int = MEMORY
    backing: str = "memfd"
    within_s: float = 90.0


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
    "loss-1-rtt-300": Row(Conditions(delay_ms=150, loss_percent=1), memory=32 * MIB, within_s=600.0),
    "reorder-5-rtt-100": Row(Conditions(delay_ms=50, reorder_percent=5)),
    "mbit-20": Row(Conditions(delay_ms=0.5, rate_mbit=20, queue_ms=50)),
    "mbit-200": Row(Conditions(delay_ms=0.5, rate_mbit=200, queue_ms=50)),
    "rtt-300-stalls-of-the-source": Row(Conditions(delay_ms=150), stalls("home")),
    "rtt-300-stalls-of-the-destination": Row(Conditions(delay_ms=150), stalls("away")),
    "hole-8s": hole(8),
    "hole-8s-answers": hole(8, "ab"),
    "hole-8s-requests": hole(8, "ba"),
}
BOTTLENECKS = {
    "mbit-100-queue-50": Conditions(delay_ms=0.5, rate_mbit=100, queue_ms=50),
    "mbit-100-queue-500": Conditions(delay_ms=0.5, rate_mbit=100, queue_ms=500),
    "mbit-100-queue-50-rtt-10": Conditions(delay_ms=5, rate_mbit=100, queue_ms=50),
    "mbit-100-queue-500-rtt-10": Conditions(delay_ms=5, rate_mbit=100, queue_ms=500),
}
SLACK_MS = 2.0
"""Of a first touch at a bottleneck, on top of two round trips."""
TRIES = 3
"""A busy machine may be slow once."""


def rows() -> list[object]:
    long = [
        pytest.param(name, row, id=name, marks=[pytest.mark.long, pytest.mark.timeout(200 + row.within_s)])
        for name, row in LONG.items()
    ]
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
    moved = await move(pair, course, vm, row.limit, row.disturb, within_s=patient(row.within_s))
    figures.add(vm, row.conditions, moved)
    assert problems(await course.judge(SETTLE_S)) == []


@pytest.mark.long
@pytest.mark.parametrize(("vm", "conditions"), BOTTLENECKS.items(), ids=BOTTLENECKS)
async def test_first_touch_does_not_wait_behind_the_push(
    pair: NetworkPair, figures: Figures, vm: str, conditions: Conditions
):
    """Half of the first touches take at most two round trips and `SLACK_MS`, and the machine's own time. That is the
    part of the same move at no rate that exceeds a round trip. A full queue alone would take longer."""
    rtt_ms = 2 * conditions.delay_ms
    free = await judged(pair, f"{vm}-free", replace(conditions, rate_mbit=0, queue_ms=0))
    machine_ms = max(0.0, p50_ms(free) - rtt_ms)
    best_ms = inf
    for number in range(TRIES):
        moved = await judged(pair, f"{vm}-{number}", conditions)
        if p50_ms(moved) < best_ms:
            best_ms = p50_ms(moved)
            figures.add(vm, conditions, moved)
        if best_ms <= 2 * rtt_ms + SLACK_MS + machine_ms:
            return
    raise AssertionError(f"p50 {best_ms:.1f} ms at a round trip of {rtt_ms} ms; the machine's own {machine_ms:.1f} ms")


async def judged(pair: NetworkPair, vm: str, conditions: Conditions) -> Migration:
    """A move without a limit of the push, of which the guest found nothing wrong."""
    course = Course(await cast(pair, vm))
    pair.emulator.set(conditions)
    moved = await move(pair, course, vm)
    assert problems(await course.judge(SETTLE_S)) == []
    await pair.stage.dismiss_guests()
    return moved


def p50_ms(moved: Migration) -> float:
    return moved.progress.first_touch.p50_us / 1e3


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
