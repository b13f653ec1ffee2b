"""After the commit the destination answers, or its journal settles the job."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.moves import before, come
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import Outcome, Phase
from vmferry.testing.host import Pair


async def test_an_unreachable_destination(pair: Pair) -> None:
    await pair.service.create("m1", "web", "nowhere")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.DESTINATION_UNREACHABLE)
    assert pair.source.runs
    assert "vmm.stop" not in pair.a.script.transcript


async def test_a_lost_answer_to_start_is_asked_for_again(pair: Pair) -> None:
    lost = VmferryError(Reason.DESTINATION_UNREACHABLE, "connection reset.")
    pair.a.script.fail_at("peer.start answered", lost, times=2)
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.a.script.transcript.count("peer.start") == 3
    assert pair.b.script.transcript.count("vmm.start") == 1
    assert pair.b.script.transcript.count("store.journal running") == 1


async def test_no_answer_makes_the_job_undecided_until_the_journal_speaks(pair: Pair) -> None:
    pair.b.script.hang_at("pager.connect_lanes")
    await pair.service.create("m1", "web", "b")
    await pair.b.script.hung.wait()
    pair.a.script.fail_at("peer.start", VmferryError(Reason.DESTINATION_UNREACHABLE, "cut."), times=10_000)
    pair.b.script.release()
    job = await pair.a.job_where("m1", phases=frozenset({"UNDECIDED"}))
    assert job.reason_code is Reason.UNDECIDED
    assert pair.running == 0
    with pytest.raises(VmferryError) as caught:
        await pair.service.cancel("m1")
    assert caught.value.reason is Reason.PAST_NO_RETURN
    pair.a.script.faults.clear()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.running == 1


async def test_a_destination_that_refused_after_the_commit_gives_the_vm_back(pair: Pair) -> None:
    """The waiting VMM dies at the moment of the commit. Its host refuses before it journals running."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.destination.die("oom")
    pair.a.script.release()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.MIGRATION_REFUSED)
    assert pair.source.runs
    assert before(pair.a.script.transcript, "store.journal settled", "vmm.resume")
    assert pair.nothing_left()


async def test_a_destination_that_lost_its_journal_settles_nothing(pair: Pair) -> None:
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.b.kill()
    pair.b.store._journal.clear()
    pair.b.store._incomings.clear()
    await pair.b.start()
    pair.a.script.release()
    job = await pair.a.job_where("m1", phases=frozenset({"UNDECIDED"}))
    async with asyncio.timeout(patient(20)):
        while "by hand" not in job.reason:
            await asyncio.sleep(0.005)
            job = await pair.service.job("m1")
    assert "UNKNOWN" in job.reason
    assert pair.running == 0
    assert "vmm.resume" not in pair.a.script.transcript


async def test_the_destination_answers_its_journal(pair: Pair) -> None:
    assert pair.b.service is not None
    arrivals = pair.b.service.incoming
    assert await arrivals.outcome("never") == (Outcome.UNKNOWN, "")
    await arrivals.refuse("never", "not wanted")
    assert await arrivals.outcome("never") == (Outcome.REFUSED, "not wanted")
    with pytest.raises(VmferryError) as caught:
        await arrivals.start("never")
    assert caught.value.reason is Reason.MIGRATION_REFUSED
    await pair.b.kill()
    await pair.b.start()
    assert pair.b.service is not None
    assert (await pair.b.service.incoming.outcome("never"))[0] is Outcome.REFUSED


async def test_the_reason_has_the_destinations_answer_to_start(pair: Pair) -> None:
    full = VmferryError(Reason.STORE_FAILED, "the store of b: disk is full.", "Free some space.")
    pair.b.script.fail_at("store.journal running", full, times=10_000)
    await pair.service.create("m1", "web", "b")
    for first in (True, False):  # Also once the journal of the destination was asked.
        job = await pair.a.job_where("m1", phases=frozenset({"UNDECIDED"}))
        assert "b answers Start with STORE_FAILED: the store of b: disk is full. Free some space." in job.reason
        if first:
            await come(lambda: pair.a.script.transcript.count("peer.outcome answered") > 1)
    pair.b.script.faults.clear()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_silence_after_an_answer_to_start_keeps_the_answer(pair: Pair) -> None:
    full = VmferryError(Reason.STORE_FAILED, "the store of b: disk is full.", "Free some space.")
    pair.b.script.fail_at("store.journal running", full, times=10_000)
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"UNDECIDED"}))
    cut = VmferryError(Reason.DESTINATION_UNREACHABLE, "no route to host.")
    pair.a.script.fail_at("peer.outcome", cut, times=10_000)
    pair.a.script.fail_at("peer.start", cut, times=10_000)
    async with asyncio.timeout(patient(20)):
        async for job in pair.service.watch("m1", 0):
            if "no route to host" in job.reason:
                break
    assert "Before that, the destination b answers Start with STORE_FAILED" in job.reason
    pair.a.script.faults.clear()
    pair.b.script.faults.clear()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
