"""Measurements of vmferry alone: two pagers without a push, each with a VMM of one thread. And the floor: userfaultfd
over TCP and nothing else."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial

from vmferry.units import MIB, PAGE_4K
from vmferry.v1 import common_pb2, pager_pb2
from vmferry_bench.figures import common_rates, quantiles, share_of
from vmferry_bench.injected import injections
from vmferry_bench.native import BenchError, native
from vmferry_bench.pair import ANYWHERE, MEMORY_MIB, Ends, Pair, Touches, apart, memory_error, pagers
from vmferry_bench.paper import measure_paper
from vmferry_bench.plan import MANY_PAUSE_US
from vmferry_bench.processes import busy_share, machine_cpu
from vmferry_bench.shape import APART, BACKINGS, Alone, Many, Singles

TOUCHES = 1500
PAUSE_US = 500
MANY = (1, 4, 16)
MANY_QUICK = (1, 16)
MANY_TOUCHES = 500
"""Of each VM, with a pause after each."""
MANY_TOUCHES_AT_ONCE = 50_000
"""Without: most of half a minute with 16 VMs, since the scheduler may favour one of them for a second or two."""
MANY_MEMORY_MIB = 256
MANY_BACKING = "memfd"


def _order(count: int, memory_mib: int = MEMORY_MIB) -> list[int]:
    return random.Random(count).sample(range(memory_mib * MIB // PAGE_4K), count)  # need not be secret


async def idle(backing: str, ends: Ends) -> tuple[list[float], common_pb2.LatencySummary]:
    """First touches with nothing else on the link, and the destination pager's count of them."""
    async with pagers(backing, ends) as pair:
        found = await pair.vmm.touch(_order(TOUCHES), PAUSE_US)
        status = await pair.destination.GetStatus(pager_pb2.GetStatusRequest())
    _check(found, set())
    return found.us, status.progress.first_touch


async def _poison(backing: str, ends: Ends) -> tuple[list[float], list[float]]:
    """Touches of poisoned pages and, between them, of pages with data."""
    order = _order(TOUCHES)
    bad = set(order[::2])
    async with pagers(backing, ends) as pair:
        await pair.source.MarkPoisoned(pager_pb2.MarkPoisonedRequest(errors=map(memory_error, bad)))
        found = await pair.vmm.touch(order, PAUSE_US)
    _check(found, bad)
    return found.us[::2], found.us[1::2]


def _check(found: Touches, bad: set[int]) -> None:
    """Raises:
    BenchError: a page has the wrong content or poison: a fault of vmferry.
    """
    if found.wrong or set(found.poison) != bad:
        raise BenchError(
            f"vmferry: {len(found.wrong)} pages with wrong content, {len(found.poison)} poisoned instead of {len(bad)}"
        )


async def floor(backing: str, ends: Ends) -> list[float]:
    """First touches with userfaultfd and TCP alone."""
    options = ("--touches", str(TOUCHES), "--pause-us", str(PAUSE_US), "--backing", backing)
    found = Touches(**await native("--cpus", ends.destination, "floor", *options, "--source-cpus", ends.source))
    if found.wrong or found.poison:
        raise BenchError("the floor is wrong")
    return found.us


async def _singles(backing: str, ends: Ends, rounds: int) -> Singles:
    below: list[float] = []
    undisturbed: list[float] = []
    poison: list[float] = []
    data: list[float] = []
    for _ in range(rounds):
        below += await floor(backing, ends)
        undisturbed += (await idle(backing, ends))[0]
        bad, good = await _poison(backing, ends)
        poison += bad
        data += good
    return Singles(*map(quantiles, (below, undisturbed, poison, data)))


async def _many(count: int) -> list[Many]:
    """`count` VMs that touch at the same time: with a pause after each touch, and without."""
    each = partial(pagers, MANY_BACKING, memory_mib=MANY_MEMORY_MIB)
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(each()) for _ in range(count)]
        order = _order(MANY_TOUCHES + MANY_TOUCHES_AT_ONCE, MANY_MEMORY_MIB)
        return [
            await _together(pairs, order[:MANY_TOUCHES], MANY_PAUSE_US),
            await _together(pairs, order[MANY_TOUCHES:], 0),
        ]


async def _together(pairs: Sequence[Pair], order: Sequence[int], pause_us: int) -> Many:
    async def one(pair: Pair) -> tuple[float, list[float]]:
        begun = time.monotonic()
        found = await pair.vmm.touch(order, pause_us)
        elapsed = time.monotonic() - begun
        _check(found, set())
        return elapsed, found.us

    before = machine_cpu()
    each = await asyncio.gather(*map(one, pairs))
    busy = busy_share(before, machine_cpu())
    us = [touches for _, touches in each]
    return Many(
        vms=len(pairs),
        pause_us=pause_us,
        rates=common_rates([elapsed for elapsed, _ in each], us, pause_us),
        p50_us=sorted(share_of(touches, 0.5) for touches in us),
        p99_us=sorted(share_of(touches, 0.99) for touches in us),
        busy=busy,
    )


async def measure_alone(rounds: int, whole: bool) -> Alone:
    """Everything, or without `whole` the figures of the goals alone."""
    singles: dict[str, Singles] = {}
    for words, ends in (("", ANYWHERE), (APART, apart())):
        singles |= {f"{backing}{words}": await _singles(backing, ends, rounds) for backing in BACKINGS}
    counts = MANY if whole else MANY_QUICK
    many = [row for _ in range(rounds) for count in counts for row in await _many(count)]
    return Alone(singles, many, await measure_paper() if whole else {}, quantiles(await injections()))
