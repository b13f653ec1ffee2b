"""Postcopy: pauses, losses and memory errors while the pages arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.moves import PAUSED, POSTCOPY, come
from vmferry.errors import Reason
from vmferry.model.memory import Backing
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Phase
from vmferry.model.pager import LinkChanged, MemoryDetached, PagerFailedEvent
from vmferry.testing.host import Pair
from vmferry.units import Gpa


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


async def test_a_pager_that_cannot_continue_pauses_the_job(pair: Pair) -> None:
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


async def test_an_error_during_postcopy_reaches_the_pagers_of_both_sides(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    await pair.service.record_vmm_errors("web", [LedgerEntry(Gpa(0x1000), Origin.VMM)])
    await pair.b.service.report_error("web", 0x2345, 0)
    assert set(pair.a.pagers.running["m1-source"].poisoned) == {0x1000}
    assert set(pair.b.pagers.running["m1-destination"].poisoned) == {0x2000}


async def test_the_end_is_told_at_once(pair: Pair) -> None:
    """The last page ends the watch at once, without a poll or an update: the clock of the test has stopped."""
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    await come(lambda: "pager.start_push" in pair.b.script.transcript)
    pair.network.clock.stop()
    pager.all_arrive()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_job_that_completes_out_of_a_pause_has_no_reason_any_more(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pager = pair.b.pagers.running["m1-destination"]
    pager.state = replace(pager.state, link_up=False, link_reason="no route to host")
    pager.emit(LinkChanged(up=False, reason="no route to host"))
    await pair.a.job_where("m1", phases=PAUSED)
    pager.all_arrive()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code, job.reason) == (Phase.COMPLETED, None, "")


@pytest.mark.parametrize("restarted", [False, True], ids=["same daemon", "restarted daemon"])
async def test_a_vmm_that_dies_together_with_its_pager_is_lost(pair: Pair, restarted: bool) -> None:
    """Nobody tells: the pager that would is gone."""
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    if restarted:
        await pair.b.kill()
    pair.destination.die("oom")
    pair.b.ended.add(pair.destination.identity.pid)
    pair.b.pagers.running["m1-destination"].end()
    if restarted:
        await pair.b.start()
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.LOST, Reason.VMM_GONE)
    assert job.reason == "the VMM (pid 200) has ended, and its pager does not answer"
    assert not pair.source.runs


async def test_a_pager_that_dies_alone_does_not_lose_the_vm(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pair.b.pagers.running["m1-destination"].end()
    job = await pair.a.job_where("m1", phases=PAUSED)
    assert job.reason_code is not Reason.VMM_GONE
    assert pair.destination.runs


async def test_a_waiting_vmm_that_dies_together_with_its_pager_frees_its_name(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    pair.destination.die("oom")
    pair.b.ended.add(pair.destination.identity.pid)
    pair.b.pagers.running["m1-destination"].end()
    await come(lambda: "refused" in pair.b.store.kinds())
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.FAILED
    assert pair.source.runs


async def test_a_guard_whose_vmm_died_with_its_pager_is_over(pair: Pair) -> None:
    assert pair.b.service is not None
    incoming = pair.b.service.incoming
    await pair.service.report_error("web", 0x1000, 0)
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert [one.guarded_pages for one in incoming.all()] == [1]
    pair.destination.die("shut down")
    pair.b.ended.add(pair.destination.identity.pid)
    pair.b.pagers.running["m1-destination"].end()
    await come(lambda: [one.guarded_pages for one in incoming.all()] == [0])
    await come(lambda: not pair.b.pagers.running)


@pytest.mark.parametrize("restarted", [False, True], ids=["same daemon", "restarted daemon"])
@pytest.mark.parametrize(("backing", "code"), [(Backing.ANONYMOUS, Reason.VMM_GONE), (Backing.MEMFD, Reason.LINK_DOWN)])
async def test_a_link_that_fails_because_the_sources_vmm_ended_names_the_vmm(
    pair: Pair, backing: Backing, code: Reason, restarted: bool
) -> None:
    """Anonymous memory ends with its VMM. A memfd is served on, so a link that is down is down."""
    pair.source.make_layout_of(backing)
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    if restarted:
        await pair.a.kill()
    pair.source.die("oom")
    pair.a.ended.add(pair.source.identity.pid)
    if restarted:
        await pair.a.start()
    pager = pair.b.pagers.running["m1-destination"]
    words = "the source says: cannot read guest memory"
    pager.state = replace(pager.state, link_up=False, link_reason=words)
    pager.emit(LinkChanged(up=False, reason=words))
    job = await pair.a.job_where("m1", phases=PAUSED)
    assert (job.reason_code, job.reason) == (code, words)
    pager.state = replace(pager.state, link_up=True)
    pager.emit(LinkChanged(up=True, reason=""))
    assert (await pair.a.job_where("m1", phases=POSTCOPY)).reason_code is None
