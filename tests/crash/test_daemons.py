# ruff: noqa: ASYNC110 these tests poll the fakes, which have no signal
"""I3 and I4: daemons are killed at every point of a move, before and after each effect, and started again.

At no moment does the VM run twice. Once both daemons are up again it runs exactly once: on the destination if the job
is COMPLETED, otherwise on the source, and then nothing is left behind.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import TERMINAL, Phase
from vmferry.testing.host import FakeHost, Pair, make_pair

POINTS_A = 64
POINTS_B = 44
DEADLINE_S = patient(20)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = await make_pair()
    yield made
    for host in (made.a, made.b):
        await host.kill()


async def ask(pair: Pair) -> None:
    """Starts the move as a client does. The answer may never arrive."""
    with suppress(asyncio.CancelledError, VmferryError):
        await pair.service.create("m1", "web", "b")


async def hung_or_over(pair: Pair, host: FakeHost, asking: asyncio.Task[None]) -> bool:
    """True once the host hangs at its point. False: the move ended, or never began, without reaching the point."""
    async with asyncio.timeout(DEADLINE_S):
        while not host.script.hung.is_set():
            job = await pair.a.store.job("m1")
            if job is not None and job.phase in TERMINAL and not pair.b.pagers.running:
                return False
            if job is None and asking.done():
                return False
            await asyncio.sleep(0.0005)
    return True


async def settled(pair: Pair) -> None:
    """Both daemons are up: the VM runs exactly once in the end, and the job tells on which host."""
    job = await pair.a.store.job("m1")
    if job is None:
        assert pair.source.runs
        assert not pair.destination.runs
        assert pair.broken == []
        return
    job = await pair.a.job_where("m1", within_s=DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S):
        while not (pair.nothing_left() or job.phase is Phase.COMPLETED):
            await asyncio.sleep(0.001)
    assert pair.broken == []
    assert pair.running == 1, f"{job.phase}: {job.reason}"
    assert pair.destination.runs is (job.phase is Phase.COMPLETED)
    assert pair.source.runs is (job.phase in (Phase.FAILED, Phase.CANCELLED))


async def crash(pair: Pair, host: FakeHost, others: list[FakeHost], point: int) -> None:
    host.script.hang_at_point = point
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(ask(pair), name="client")
        came = await hung_or_over(pair, host, asking)
        pair.look()
        if came:
            for one in (host, *others):
                await one.kill()
            pair.look()
            for one in (host, *others):
                await one.start()
        asking.cancel()
    await settled(pair)


@pytest.mark.parametrize("point", range(1, POINTS_A))
async def test_the_source_daemon_dies(pair: Pair, point: int) -> None:
    await crash(pair, pair.a, [], point)


@pytest.mark.parametrize("point", range(1, POINTS_B))
async def test_the_destination_daemon_dies(pair: Pair, point: int) -> None:
    await crash(pair, pair.b, [], point)


@pytest.mark.parametrize("point", range(1, POINTS_A))
async def test_both_daemons_die_at_a_point_of_the_source(pair: Pair, point: int) -> None:
    await crash(pair, pair.a, [pair.b], point)


@pytest.mark.parametrize("point", range(1, POINTS_B))
async def test_both_daemons_die_at_a_point_of_the_destination(pair: Pair, point: int) -> None:
    await crash(pair, pair.b, [pair.a], point)


async def test_the_points_are_all_of_them(pair: Pair) -> None:
    """A longer move needs longer ranges above."""
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    async with asyncio.timeout(DEADLINE_S):
        while pair.b.pagers.running:
            await asyncio.sleep(0.001)
    assert 40 < pair.a.script.points < POINTS_A
    assert 30 < pair.b.script.points < POINTS_B


@pytest.mark.parametrize("seed", range(60))
async def test_daemons_die_again_and_again(pair: Pair, seed: int) -> None:
    """The daemons also die while they recover. Answers are lost in between, and a client cancels."""
    dice = random.Random(seed)
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(ask(pair), name="client")
        for _ in range(dice.randint(2, 5)):
            host = dice.choice((pair.a, pair.b))
            host.script.hang_at_point = host.script.points + dice.randint(1, 30)
            if dice.random() < 0.5:
                step = dice.choice(("start", "ready", "prepare", "refuse", "outcome"))
                lost = VmferryError(Reason.DESTINATION_UNREACHABLE, "connection reset.")
                pair.a.script.fail_at(f"peer.{step} answered", lost, times=dice.randint(1, 4))
            if not await hung_or_over(pair, host, asking):
                break
            if dice.random() < 0.2 and pair.a.service is not None:
                cancelling = tasks.create_task(cancel(pair), name="cancel")
                await asyncio.sleep(0.002)
                cancelling.cancel()
            pair.look()
            both = dice.random() < 0.3
            victims = [pair.a, pair.b] if both else [host]
            for one in victims:
                await one.kill()
            for one in victims:
                await one.start()
        asking.cancel()
    await settled(pair)


async def cancel(pair: Pair) -> None:
    with suppress(asyncio.CancelledError, VmferryError):
        await pair.service.cancel("m1")


async def test_the_destination_stays_away_after_the_commit(pair: Pair) -> None:
    """The VM runs nowhere, and the job tells that: nothing is guessed."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.b.kill()
    await pair.a.kill()
    await pair.a.start()
    job = await pair.a.job_where("m1", phases=frozenset({"UNDECIDED"}))
    assert job.reason_code is Reason.UNDECIDED
    assert pair.running == 0
    await pair.b.start()
    await settled(pair)
    assert pair.destination.runs


async def test_a_waiting_vmm_that_dies_while_both_daemons_are_down_after_the_commit(pair: Pair) -> None:
    """The destination proves that it has not run the VM and never will, so the VM returns."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    for host in (pair.a, pair.b):
        await host.kill()
    pair.destination.die("oom")
    for host in (pair.b, pair.a):
        await host.start()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.MIGRATION_REFUSED)
    assert pair.source.runs


async def test_events_are_taken_again_from_the_last_acknowledged(pair: Pair) -> None:
    from vmferry.model.memory_error import LedgerEntry, Origin
    from vmferry.model.pager import MemoryErrorFound
    from vmferry.units import Gpa

    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    pager = pair.b.pagers.running["m1-destination"]
    pair.b.script.hang_at("store.errors", after=True)
    error = LedgerEntry(Gpa(0x3000), Origin.READ, first_seen_us=9, last_seen_us=9)
    pager.emit(MemoryErrorFound(error, 0, 0, reported=True))
    await pair.b.script.hung.wait()
    await pair.b.kill()
    assert pager.kept_events == 1
    await pair.b.start()
    async with asyncio.timeout(DEADLINE_S):
        while pager.kept_events:
            await asyncio.sleep(0.001)
    assert [(entry.gpa, entry.count) for entry in await pair.b.store.ledger("web")] == [(0x3000, 1)]
    pager.all_arrive()
    await settled(pair)


async def test_a_commit_that_failed_but_was_written_and_then_a_crash(pair: Pair) -> None:
    """The VM runs on the source again. The commit on the disk must never count."""
    full = VmferryError(Reason.STORE_FAILED, "disk full.")
    pair.a.script.fail_at("store.journal commit", full, after=True)
    pair.a.script.hang_at("vmm.resume", after=True)
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert pair.source.runs
    await pair.a.kill()
    await pair.a.start()
    await settled(pair)
    assert pair.source.runs


async def test_a_refusal_that_a_crash_cut_off_gives_everything_back(pair: Pair) -> None:
    """It is in the journal and the source learns of it, but the pager still runs."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.b.script.hang_at("store.journal refused", after=True)
    pair.destination.die("oom")
    pair.a.script.release()
    await pair.b.script.hung.wait()
    await pair.b.kill()
    await pair.b.start()
    await settled(pair)
    job = await pair.service.job("m1")
    assert pair.source.runs
    assert "the waiting VMM is gone" in job.reason
