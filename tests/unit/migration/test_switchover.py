"""The switchover: the order of its steps, and failures in them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.support.moves import POSTCOPY, come
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Outcome, Phase
from vmferry.model.pager import LinkChanged, MemoryErrorFound
from vmferry.testing.host import Pair
from vmferry.units import Gpa


@pytest.mark.parametrize("seconds", [0.0, 0.25])
async def test_downtime_is_from_stop_to_the_answer_of_start(pair: Pair, seconds: float) -> None:
    pair.a.script.hang_at("peer.start answered")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    start = pair.network.clock.monotonic_s()
    pair.network.clock.advance(seconds)
    pair.a.script.release()
    job = await pair.a.job_where("m1")
    assert seconds <= job.downtime_s <= pair.network.clock.monotonic_s() - start + 1
    assert job.stopped_us <= job.started_us


async def test_a_lane_that_is_down_fails_the_move_before_the_commit(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pager = pair.b.pagers.running["m1-destination"]
    pager.state = replace(pager.state, link_up=False, link_reason="no route to host")
    pager.emit(LinkChanged(up=False, reason="no route to host"))
    await come(lambda: not pager.kept_events)
    pair.a.script.release()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.LINK_DOWN)
    assert "no route to host" in job.reason
    assert pair.source.runs
    assert pair.nothing_left()


@pytest.mark.parametrize("listens", [False, True])
async def test_the_pager_is_asked_for_its_lane_only_if_its_events_do_not_say(pair: Pair, listens: bool) -> None:
    assert pair.b.service is not None
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pager = pair.b.pagers.running["m1-destination"]
    await come(lambda: not pager.kept_events)
    if not listens:
        pair.b.service.incoming._known["m1"].link_up = False
    looked = pager.looked
    pair.b.script.hang_at("vmm.load_state", after=True)
    pair.a.script.release()
    await pair.b.script.hung.wait()
    assert pager.looked - looked == (0 if listens else 1)
    pair.b.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_link_that_goes_down_behind_other_events_fails_the_move_before_the_commit(pair: Pair) -> None:
    """The daemon records memory errors one at a time, each durably. A report of a broken link may wait behind them."""
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pager = pair.b.pagers.running["m1-destination"]
    await come(lambda: not pager.kept_events)
    pair.b.script.hang_at("store.errors")
    pager.emit(MemoryErrorFound(LedgerEntry(Gpa(0x7000), Origin.READ), 0x7F0000007000, 0, reported=False))
    pager.state = replace(pager.state, link_up=False, link_reason="no route to host")
    pager.emit(LinkChanged(up=False, reason="no route to host"))
    await pair.b.script.hung.wait()
    pair.a.script.release()
    job = await pair.a.job_where("m1")
    pair.b.script.release()
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.LINK_DOWN)
    assert pair.source.runs


async def test_a_daemon_that_restarts_after_its_answer_starts_the_vm(pair: Pair) -> None:
    """The journal of the destination has no entry for Ready: the VMM holds the state."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.b.kill()
    await pair.b.start()
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.destination.runs


async def test_the_commit_waits_for_a_source_that_serves_and_not_for_the_state_on_its_way(pair: Pair) -> None:
    """A commit recovered after a crash finds its pager ready. The destination knows whether the state arrived."""
    pair.a.script.hang_at("pager.freeze")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await come(lambda: pair.destination.identity.state == "loaded")
    assert "store.journal commit" not in pair.a.script.transcript
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_nothing_is_asked_to_start_before_ready_is_answered(pair: Pair) -> None:
    pair.b.script.hang_at("vmm.load_state")
    await pair.service.create("m1", "web", "b")
    await pair.b.script.hung.wait()
    await come(lambda: "store.journal commit" in pair.a.script.transcript)
    await asyncio.sleep(0.01)
    assert "peer.start" not in pair.a.script.transcript
    pair.b.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_start_whose_ready_never_came_is_refused(pair: Pair) -> None:
    """The daemon is killed after its commit, while Ready is still on its way."""
    pair.a.script.hang_at("peer.ready")
    await pair.service.create("m1", "web", "b")
    await come(lambda: "store.journal commit" in pair.a.script.transcript)
    await pair.a.kill()
    await pair.a.start()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.MIGRATION_REFUSED)
    assert "no device state" in job.reason
    assert pair.source.runs
    assert pair.nothing_left()


async def test_a_start_without_a_device_state_is_refused(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.script.fail_at("vmm.load_state", VmferryError(Reason.VMM_REFUSED, "bad state."))
    pair.a.script.hang_at("peer.refuse")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert await pair.b.service.incoming.outcome("m1") == (Outcome.PREPARED, "")
    with pytest.raises(VmferryError) as caught:
        await pair.b.service.incoming.start("m1")
    assert caught.value.reason is Reason.MIGRATION_REFUSED
    assert "no device state" in (await pair.b.service.incoming.outcome("m1"))[1]
    assert not pair.destination.runs
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.FAILED
    assert pair.source.runs


async def test_a_repeated_ready_loads_the_state_that_is_missing(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.script.fail_at("vmm.load_state", VmferryError(Reason.VMM_REFUSED, "busy."))
    pair.a.script.hang_at("peer.refuse")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.b.service.incoming.ready("m1", b"state", [])
    assert pair.destination.identity.state == "loaded"
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.FAILED
    assert pair.source.runs
    assert pair.nothing_left()


async def test_an_error_that_is_known_on_both_sides_is_written_and_told_once(pair: Pair) -> None:
    await pair.service.record_vmm_errors("web", [LedgerEntry(Gpa(0x5000), Origin.VMM, first_seen_us=3, last_seen_us=3)])
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.b.script.transcript.count("store.errors") == 1
    assert pair.b.script.transcript.count("pager.mark_poisoned") == 1


async def test_a_switchover_that_hangs_is_seen_by_watchers(pair: Pair) -> None:
    """Watchers see a switchover a little later than other phases, but during it."""
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    async with asyncio.timeout(patient(20)):
        async for job in pair.service.watch("m1", 0):
            if job.phase is Phase.SWITCHOVER:
                break
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_the_processors_of_both_hosts_are_awake_while_the_vm_is_stopped(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    pair.a.script.hang_at("vmm.stop")
    pair.b.script.hang_at("vmm.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert (pair.a.processors.awake, pair.b.processors.awake) == ({"m1-source"}, set())
    pair.a.script.release()
    await pair.b.script.hung.wait()
    assert (pair.a.processors.awake, pair.b.processors.awake) == ({"m1-source"}, {"m1-destination"})
    pair.b.script.release()
    await pair.a.job_where("m1", phases=POSTCOPY)
    assert not pair.a.processors.awake | pair.b.processors.awake


@pytest.mark.parametrize("stops", [True, False])
async def test_a_state_that_cannot_be_saved_is_no_reason_before_stop_is_answered(pair: Pair, stops: bool) -> None:
    if not stops:
        pair.a.script.fail_at("vmm.stop", VmferryError(Reason.VMM_TIMEOUT, "no answer."), after=True)
    stopping, answer = asyncio.Event(), asyncio.Event()
    stop = pair.source.stop

    async def slow_stop() -> None:
        stopping.set()
        await answer.wait()
        await stop()

    pair.source.stop = slow_stop  # type: ignore[method-assign]
    pair.a.script.fail_at("vmm.save_state", VmferryError(Reason.VMM_REFUSED, "it runs."))
    await pair.service.create("m1", "web", "b")
    await stopping.wait()
    await asyncio.sleep(0.02)
    assert (await pair.service.job("m1")).phase is Phase.SWITCHOVER
    answer.set()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.VMM_REFUSED if stops else Reason.VMM_TIMEOUT)
    assert pair.source.runs
    assert pair.nothing_left()
