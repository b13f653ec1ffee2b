"""Before the commit every failure and every cancel brings the VM back to its source."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.moves import before, come
from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import Phase
from vmferry.testing.host import Pair

STEPS_BEFORE_START = [
    "pagers.start",
    "pager.serve_source",
    "vmm.attach_memory",
    "peer.hello",
    "pager.list_held",
    "peer.prepare",
    "peer.prepare answered",
    "store.job SWITCHOVER",
    "store.journal begin",
    "vmm.stop",
    "vmm.save_state",
    "peer.ready",
    "pager.freeze",
    "store.journal commit",
    "peer.ready answered",
]


@pytest.mark.parametrize("step", STEPS_BEFORE_START)
@pytest.mark.parametrize("after", [False, True])
async def test_a_failure_before_the_start_leaves_the_vm_on_the_source(pair: Pair, step: str, after: bool) -> None:
    pair.a.script.fail_at(step, VmferryError(Reason.VMM_REFUSED, "no such luck.", "Try harder."), after=after)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.VMM_REFUSED)
    assert "Try harder" in job.reason
    assert pair.source.runs
    assert not pair.destination.runs
    assert pair.nothing_left()
    assert "peer.start" not in pair.a.script.transcript


@pytest.mark.parametrize("step", STEPS_BEFORE_START)
@pytest.mark.parametrize("after", [False, True])
async def test_cancel_while_a_step_hangs(pair: Pair, step: str, after: bool) -> None:
    pair.a.script.hang_at(step, after=after)
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    cancelling = asyncio.create_task(pair.service.cancel("m1"))
    await asyncio.sleep(0.01)
    pair.a.script.release()
    job = await cancelling
    assert (job.phase, job.reason_code) == (Phase.CANCELLED, Reason.CANCELLED)
    assert pair.source.runs
    assert pair.nothing_left()
    assert await pair.service.cancel("m1") == job


async def test_an_error_that_nobody_expects_on_the_way_back_leaves_no_job_behind(pair: Pair) -> None:
    pair.a.script.hang_at("pager.serve_source")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.a.script.fail_at("pagers.remove", OSError("Directory not empty"))
    cancelling = asyncio.create_task(pair.service.cancel("m1"))
    await asyncio.sleep(0.01)
    pair.a.script.release()
    assert (await cancelling).phase == Phase.CANCELLED
    assert pair.source.runs
    assert pair.nothing_left()


@pytest.mark.parametrize(
    "step",
    [
        "pagers.start",
        "pager.expect_destination",
        "vmm.prepare",
        "pager.preallocate",
        "pager.connect_lanes",
        "vmm.load_state",
    ],
)
async def test_a_failure_on_the_destination_before_the_commit(pair: Pair, step: str) -> None:
    pair.b.script.fail_at(step, VmferryError(Reason.DESTINATION_NO_MEMORY, "no memory.", "Free some."))
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.DESTINATION_NO_MEMORY)
    assert pair.source.runs
    assert pair.nothing_left()


@pytest.mark.parametrize("step", ["vmm.prepare", "vmm.load_state"])
async def test_a_destination_that_hangs_is_refused_by_a_cancel(pair: Pair, step: str) -> None:
    pair.b.script.hang_at(step)
    await pair.service.create("m1", "web", "b")
    await pair.b.script.hung.wait()
    assert (await pair.service.cancel("m1")).phase is Phase.CANCELLED
    assert pair.source.runs
    assert pair.nothing_left()


async def test_a_commit_that_may_have_been_written_is_taken_back_durably(pair: Pair) -> None:
    full = VmferryError(Reason.STORE_FAILED, "disk full.", "Free some space.")
    pair.a.script.fail_at("store.journal commit", full, after=True)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.STORE_FAILED)
    assert before(pair.a.script.transcript, "store.journal aborted", "vmm.resume")
    assert pair.source.runs
    assert pair.nothing_left()


async def test_the_source_vmm_dies_on_the_way_back(pair: Pair) -> None:
    pair.a.script.hang_at("peer.ready")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.source.die("oom")
    job = await pair.service.cancel("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.VMM_GONE)
    assert pair.nothing_left()


async def test_the_refusal_is_tried_again_in_the_background(pair: Pair) -> None:
    pair.a.script.fail_at("vmm.save_state", VmferryError(Reason.VMM_REFUSED, "no."))
    pair.a.script.fail_at("peer.refuse", VmferryError(Reason.DESTINATION_UNREACHABLE, "cut."), times=3)
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.FAILED
    assert pair.source.runs
    await come(pair.nothing_left)


async def test_a_vm_that_comes_back_lets_the_processors_sleep(pair: Pair) -> None:
    pair.a.script.fail_at("vmm.save_state", VmferryError(Reason.VMM_REFUSED, "no."))
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    assert pair.a.processors.ever == ["m1-source"]
    assert not pair.a.processors.awake
