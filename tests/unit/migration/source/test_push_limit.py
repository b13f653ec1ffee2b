"""The limit of the background push: durable, then sent; across restarts, and at every moment of a job."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import TERMINAL, PageProgress, Phase
from vmferry.testing.host import Pair
from vmferry.testing.pager import FakePager

POSTCOPY = frozenset({"POSTCOPY"})
LIMIT = 50_000_000


async def in_postcopy(pair: Pair, push_bytes_per_s: int = 0) -> FakePager:
    """A job that stays in postcopy, and the source's pager."""
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b", push_bytes_per_s)
    await pair.a.job_where("m1", phases=POSTCOPY)
    async with asyncio.timeout(patient(20)):
        # The store has it a moment before the service.
        while (await pair.service.job("m1")).phase not in POSTCOPY:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return pair.a.pagers.running["m1-source"]


async def told(pager: FakePager, limit: int) -> None:
    async with asyncio.timeout(patient(20)):
        while pager.push_bytes_per_s != limit:  # The fake has no signal.  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def refused(pair: Pair, migration: str = "m1") -> VmferryError:
    with pytest.raises(VmferryError) as caught:
        await pair.service.set_push_limit(migration, LIMIT)
    return caught.value


@pytest.mark.parametrize(("configured", "asked", "holds"), [(0, 0, 0), (7000, 0, 7000), (7000, LIMIT, LIMIT)])
async def test_a_job_has_its_own_limit_or_the_configured_one(
    pair: Pair, configured: int, asked: int, holds: int
) -> None:
    await pair.a.stop()
    pair.a.push_bytes_per_s = configured
    await pair.a.start()
    pager = await in_postcopy(pair, asked)
    assert (await pair.service.job("m1")).push_bytes_per_s == holds
    assert pager.push_bytes_per_s == holds
    assert "pager.set_push_limit" not in pair.a.script.transcript


async def test_a_change_is_durable_and_then_told(pair: Pair) -> None:
    pager = await in_postcopy(pair)
    before = await pair.service.job("m1")
    job = await pair.service.set_push_limit("m1", LIMIT)
    assert (job.push_bytes_per_s, pager.push_bytes_per_s) == (LIMIT, LIMIT)
    assert job.revision > before.revision
    assert job.phase is Phase.POSTCOPY
    assert pair.a.script.transcript[-2:] == ["store.job POSTCOPY", "pager.set_push_limit"]
    watched = await anext(pair.service.watch("m1", before.revision))
    assert watched.push_bytes_per_s == LIMIT
    again = await pair.service.set_push_limit("m1", LIMIT)
    assert again.revision == job.revision
    assert (await pair.service.create("m1", "web", "b", 1234567)).push_bytes_per_s == LIMIT
    pair.b.pagers.running["m1-destination"].all_arrive()
    done = await pair.a.job_where("m1")
    assert (done.phase, done.push_bytes_per_s) == (Phase.COMPLETED, LIMIT)


async def test_an_unknown_and_an_ended_job(pair: Pair) -> None:
    assert (await refused(pair)).reason is Reason.MIGRATION_UNKNOWN
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    error = await refused(pair)
    assert error.reason is Reason.MIGRATION_ENDED
    assert "m1 has ended (COMPLETED)" in error.message
    stored = await pair.a.store.job("m1")
    assert stored is not None
    assert stored.push_bytes_per_s == 0


async def test_nothing_is_told_that_is_not_durable(pair: Pair) -> None:
    pager = await in_postcopy(pair)
    pair.a.script.fail_at("store.job POSTCOPY", VmferryError(Reason.STORE_FAILED, "disk full."))
    assert (await refused(pair)).reason is Reason.STORE_FAILED
    assert pager.push_bytes_per_s == 0
    assert (await pair.service.job("m1")).push_bytes_per_s == 0


async def test_a_pager_that_was_not_told_gets_the_limit_later(pair: Pair) -> None:
    pager = await in_postcopy(pair)
    pair.a.script.fail_at("pager.set_push_limit", VmferryError(Reason.PAGER_FAILED, "no answer."))
    assert (await pair.service.set_push_limit("m1", LIMIT)).push_bytes_per_s == LIMIT
    assert (await pair.service.job("m1")).push_bytes_per_s == LIMIT
    await told(pager, LIMIT)


@pytest.mark.parametrize("step", ["store.job POSTCOPY", "pager.set_push_limit"])
@pytest.mark.parametrize("after", [False, True])
async def test_a_restart_in_the_middle_of_a_change(pair: Pair, step: str, after: bool) -> None:
    """A durable limit is sent again. A limit that was not durable never existed."""
    pager = await in_postcopy(pair)
    pair.a.script.hang_at(step, after=after)
    asking = asyncio.create_task(pair.service.set_push_limit("m1", LIMIT))
    await pair.a.script.hung.wait()
    await pair.a.kill()
    await asyncio.gather(asking, return_exceptions=True)
    await pair.a.start()
    durable = after or step != "store.job POSTCOPY"
    await told(pager, LIMIT if durable else 0)
    assert (await pair.service.job("m1")).push_bytes_per_s == (LIMIT if durable else 0)


async def test_a_pager_that_does_not_answer_after_a_restart_is_told_in_the_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pager = await in_postcopy(pair, LIMIT)
    await pair.a.kill()
    pager.push_bytes_per_s = None
    answers, tries = pager.set_push_limit, list[int]()

    async def answers_at_last(push_bytes_per_s: int) -> None:
        tries.append(push_bytes_per_s)
        if len(tries) < 4:
            raise VmferryError(Reason.PAGER_FAILED, "no answer.")
        await answers(push_bytes_per_s)

    monkeypatch.setattr(pager, "set_push_limit", answers_at_last)
    await pair.a.start()
    await told(pager, LIMIT)
    assert tries == [LIMIT] * 4


@pytest.mark.parametrize("step", ["store.job PREPARING", "pagers.start", "pager.serve_source", "pager.list_held"])
@pytest.mark.parametrize("after", [False, True])
async def test_a_change_while_the_job_prepares_reaches_the_pager(pair: Pair, step: str, after: bool) -> None:
    pair.b.pagers.arrives = False
    pair.a.script.hang_at(step, after=after)
    await pair.service.create("m1", "web", "b", 7000)
    await pair.a.script.hung.wait()
    changing = asyncio.create_task(pair.service.set_push_limit("m1", LIMIT))
    await asyncio.sleep(0.01)
    pair.a.script.release()
    assert (await changing).push_bytes_per_s == LIMIT
    job = await pair.a.job_where("m1", phases=POSTCOPY)
    assert job.push_bytes_per_s == LIMIT
    assert pair.a.pagers.running["m1-source"].push_bytes_per_s == LIMIT


async def test_a_caller_that_goes_away_leaves_nothing_half_done(pair: Pair) -> None:
    pager = await in_postcopy(pair)
    pair.a.script.hang_at("store.job POSTCOPY", after=True)
    asking = asyncio.create_task(pair.service.set_push_limit("m1", LIMIT))
    await pair.a.script.hung.wait()
    asking.cancel()
    assert isinstance((await asyncio.gather(asking, return_exceptions=True))[0], asyncio.CancelledError)
    pair.a.script.release()
    await told(pager, LIMIT)
    there = pair.b.pagers.running["m1-destination"]
    there.state = replace(there.state, progress=PageProgress(total=16, absent=3))
    async with asyncio.timeout(patient(20)):
        async for job in pair.service.watch("m1", 0):  # Progress still arrives, under the newest revision.
            if job.progress.absent == 3:
                break
    assert (await pair.service.job("m1")).push_bytes_per_s == LIMIT


async def test_of_many_changes_at_once_all_know_the_same_last_one(pair: Pair) -> None:
    pager = await in_postcopy(pair)
    await asyncio.gather(*(pair.service.set_push_limit("m1", 5000 + number) for number in range(20)))
    assert pager.push_bytes_per_s == (await pair.service.job("m1")).push_bytes_per_s == 5019


async def test_changes_all_the_way_lose_no_phase(pair: Pair) -> None:
    """A limit and a phase are written at the same time, and neither overwrites the other."""
    pair.b.pagers.arrives = True

    async def change() -> int:
        for number in range(1, 10_000):
            try:
                await pair.service.set_push_limit("m1", 4096 + number)
            except VmferryError as error:
                assert error.reason is Reason.MIGRATION_ENDED
                return 4096 + number - 1
        raise AssertionError("the job does not end")

    await pair.service.create("m1", "web", "b")
    last = await change()
    seen = [job async for job in pair.service.watch("m1", 0)]
    phases = list(dict.fromkeys(job.phase for job in seen))
    assert phases == [Phase.QUEUED, Phase.PREPARING, Phase.SWITCHOVER, Phase.POSTCOPY, Phase.COMPLETED]
    assert seen[-1].push_bytes_per_s == last
    limits = [job.push_bytes_per_s for job in seen]
    assert limits == sorted(limits)


async def test_a_limit_does_not_keep_a_job_from_being_cancelled(pair: Pair) -> None:
    pair.a.script.hang_at("peer.prepare")
    await pair.service.create("m1", "web", "b", LIMIT)
    await pair.a.script.hung.wait()
    await pair.service.set_push_limit("m1", 0)
    job = await pair.service.cancel("m1")
    assert job.phase in TERMINAL
    assert job.push_bytes_per_s == 0
    assert pair.nothing_left()
