# ruff: noqa: ASYNC110 what is waited for is in the fakes, which ring no bell
"""Whole moves between two hosts in memory, read as transcripts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.environment import Environment
from vmferry.migration.inventory import MachineState
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.steps import SourceSteps
from vmferry.model.allocation import LEAST_BYTES_PER_S
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import TERMINAL, Job, Outcome, Phase
from vmferry.model.pager import LinkChanged, MemoryDetached, MemoryErrorFound, PagerFailedEvent
from vmferry.testing.host import Pair
from vmferry.testing.pager import HELD
from vmferry.testing.peer import FakePeers
from vmferry.units import MIB, Gpa

POSTCOPY = frozenset({"POSTCOPY"})
PAUSED = frozenset({"POSTCOPY_PAUSED"})


def before(steps: list[str], one: str, other: str) -> bool:
    return steps.index(one) < steps.index(other)


async def come(so: Callable[[], bool]) -> None:
    """Returns once it is so."""
    async with asyncio.timeout(patient(20)):
        while not so():
            await asyncio.sleep(0.001)


async def test_the_vm_moves(pair: Pair) -> None:
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code, job.progress.push) == (Phase.COMPLETED, None, 16)
    assert not pair.source.alive
    assert pair.destination.runs
    assert not pair.a.pagers.running
    assert pair.a.script.transcript == [
        "store.job QUEUED",
        "store.job PREPARING",
        "pagers.start",
        "pager.serve_source",
        "vmm.attach_memory",
        "peer.hello",
        "peer.hello answered",
        "pager.list_held",
        "peer.prepare",
        "peer.prepare answered",
        "store.job SWITCHOVER",
        "store.journal begin",
        "vmm.stop",
        "pager.freeze",
        "vmm.save_state",
        "store.journal commit",
        "peer.ready",
        "peer.ready answered",
        "peer.start",
        "peer.start answered",
        "store.job POSTCOPY",
        "peer.watch",
        "vmm.abandon",
        "pagers.remove",
        "peer.finish",
        "peer.finish answered",
        "store.job COMPLETED",
    ]
    there = pair.b.script.transcript
    assert before(there, "vmm.load_state", "store.journal running")
    assert before(there, "store.journal running", "vmm.start")
    assert before(there, "vmm.start", "pager.start_push")
    assert "vmm.migration_complete False" in there


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


async def test_what_the_source_holds_is_made_ready_before_prepare_is_answered(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    assert pair.b.pagers.running["m1-destination"].preallocated == HELD
    there = pair.b.script.transcript
    assert before(there, "vmm.prepare", "pager.preallocate")
    assert before(there, "pager.preallocate", "store.journal prepared")


async def test_a_source_that_holds_nothing_asks_for_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmferry.testing.pager.HELD", ())
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert "pager.preallocate" not in pair.b.script.transcript


async def test_large_guests_have_longer_to_prepare(pair: Pair) -> None:
    """The step's own deadline grows with the guest's memory, on which listing and allocating depend."""
    steps = SourceSteps(
        Environment(
            host="a",
            store=pair.a.store,
            vmms=pair.a.vmms,
            pagers=pair.a.pagers,
            peers=FakePeers(pair.a.script, pair.network.find),
        ),
        LedgerRecorder(pair.a.store),
        Job("m1", "web", "b"),
    )
    await steps.prepare(m.StartPager())
    assert steps.allowance_s(m.RequestPrepare()) == 2 * 64 * MIB / LEAST_BYTES_PER_S
    assert steps.allowance_s(m.AttachMemory()) == 0


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
    """The waiting VMM dies in the very moment of the commit; its host refuses before it journals running."""
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


async def test_a_link_that_goes_and_comes_pauses_the_job(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    pager.state = replace(pager.state, link_up=False, link_reason="no route to host")
    pager.emit(LinkChanged(up=False, reason="no route to host"))
    job = await pair.a.job_where("m1", phases=PAUSED)
    assert (job.reason_code, job.reason) == (Reason.LINK_DOWN, "no route to host")
    pager.state = replace(pager.state, link_up=True)
    pager.emit(LinkChanged(up=True, reason=""))
    assert (await pair.a.job_where("m1", phases=POSTCOPY)).reason == ""
    pager.all_arrive()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_pager_that_cannot_go_on_pauses_the_job(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    pager.state = replace(pager.state, link_up=False)
    pager.emit(PagerFailedEvent("uffd: EIO"))
    assert "uffd: EIO" in (await pair.a.job_where("m1", phases=PAUSED)).reason


async def test_a_vmm_that_dies_after_it_ran_is_lost(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    pair.destination.die("oom")
    pager.state = replace(pager.state, memory_attached=False)
    pager.emit(MemoryDetached("killed by signal 9"))
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason) == (Phase.LOST, "killed by signal 9")
    assert not pair.source.runs
    assert "vmm.resume" not in pair.a.script.transcript


async def test_the_ledger_travels_and_grows(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.pagers.arrives = False
    known = LedgerEntry(Gpa(0x5000), Origin.VMM, guest_visible=True, severity=Severity.ACTION_REQUIRED)
    await pair.service.record_vmm_error("web", known)
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    arrived = await pair.b.service.ledger("web")
    assert [(entry.gpa, entry.hop, entry.guest_visible) for entry in arrived] == [(0x5000, 1, True)]
    pager = pair.b.pagers.running["m1-destination"]
    assert set(pager.poisoned) == {0x5000}
    found = LedgerEntry(Gpa(0x7000), Origin.READ, severity=Severity.ACTION_REQUIRED, first_seen_us=5, last_seen_us=5)
    pager.emit(MemoryErrorFound(found, 0x7F0000007000, 42, reported=True))
    async with asyncio.timeout(patient(20)):
        while len(await pair.b.service.ledger("web")) < 2 or pager.kept_events:
            await asyncio.sleep(0.005)
    pager.all_arrive()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.memory_errors) == (Phase.COMPLETED, 2)
    assert (await pair.b.service.ledger("web"))[1].guest_visible
    # Poison is there: pager and uffd stay as guards.
    assert "vmm.migration_complete True" in pair.b.script.transcript
    assert "m1-destination" in pair.b.pagers.running


async def test_an_error_during_postcopy_reaches_the_pagers_of_both_sides(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    await pair.service.record_vmm_error("web", LedgerEntry(Gpa(0x1000), Origin.VMM))
    await pair.b.service.report_error("web", 0x2345, 0)
    assert set(pair.a.pagers.running["m1-source"].poisoned) == {0x1000}
    assert set(pair.b.pagers.running["m1-destination"].poisoned) == {0x2000}


async def test_an_error_is_durable_before_it_is_told(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pair.a.script.fail_at("store.errors", VmferryError(Reason.STORE_FAILED, "disk full."))
    with pytest.raises(VmferryError):
        await pair.service.record_vmm_error("web", LedgerEntry(Gpa(0x1000), Origin.VMM))
    assert not pair.a.pagers.running["m1-source"].poisoned


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


async def test_a_move_within_one_host(pair: Pair) -> None:
    waiting = pair.a.add_vmm("web", "incoming", 300)
    await pair.service.create("m1", "web", "a")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert not pair.source.alive
    assert waiting.runs
    assert [one.state for one in await pair.service.machines()] == [MachineState.RUNNING]


async def test_a_vm_moves_there_and_back(pair: Pair) -> None:
    assert pair.b.service is not None
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    back = pair.a.add_vmm("web", "incoming", 300)
    await pair.b.service.create("m2", "web", "a")
    assert (await pair.b.job_where("m2")).phase is Phase.COMPLETED
    assert back.runs
    assert not pair.destination.alive


async def test_graceful_stop_cancels_what_may_be_cancelled(pair: Pair) -> None:
    pair.a.script.hang_at("peer.prepare")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.a.stop()
    job = await pair.a.store.job("m1")
    assert job is not None
    assert (job.phase, job.reason_code) == (Phase.CANCELLED, Reason.SHUTTING_DOWN)
    assert pair.source.runs


async def test_graceful_stop_waits_for_a_move_past_the_commit(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    stopping = asyncio.create_task(pair.a.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    pair.b.pagers.running["m1-destination"].all_arrive()
    await stopping
    job = await pair.a.store.job("m1")
    assert job is not None
    assert job.phase in TERMINAL


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
    """Memory errors are taken one at a time, each durably: a link may be down long before the daemon hears so."""
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
    """That Ready was answered is in no journal of the destination: the VMM holds the state."""
    pair.a.script.hang_at("peer.start")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    await pair.b.kill()
    await pair.b.start()
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.destination.runs


async def test_the_commit_waits_for_a_source_that_serves_and_not_for_the_state_on_its_way(pair: Pair) -> None:
    """One that is taken up after a crash finds its pager ready; whether the state came, the destination knows."""
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
    """The daemon was killed behind its commit, with Ready still on its way."""
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


async def test_the_end_is_told_at_once(pair: Pair) -> None:
    """Not at the next look at the progress, nor with the next update: the clock stands still from the last page on."""
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    await come(lambda: "pager.start_push" in pair.b.script.transcript)
    pair.network.clock.stop()
    pager.all_arrive()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_the_lane_is_connected_before_the_vm_stands_still(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert "pager.connect_lanes" in pair.b.script.transcript
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


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
    await pair.service.record_vmm_error("web", LedgerEntry(Gpa(0x5000), Origin.VMM, first_seen_us=3, last_seen_us=3))
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.b.script.transcript.count("store.errors") == 1
    assert pair.b.script.transcript.count("pager.mark_poisoned") == 1


async def test_a_switchover_that_hangs_is_seen_by_watchers(pair: Pair) -> None:
    """They are told of it a little later than of other phases, not only when it is over."""
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    async with asyncio.timeout(patient(20)):
        async for job in pair.service.watch("m1", 0):
            if job.phase is Phase.SWITCHOVER:
                break
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_the_processors_of_both_hosts_are_awake_while_the_vm_stands_still(pair: Pair) -> None:
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


async def test_a_vm_that_comes_back_lets_the_processors_sleep(pair: Pair) -> None:
    pair.a.script.fail_at("vmm.save_state", VmferryError(Reason.VMM_REFUSED, "no."))
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1")
    assert pair.a.processors.ever == ["m1-source"]
    assert not pair.a.processors.awake


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
