# ruff: noqa: ASYNC110 these tests poll the fakes, which have no signal
"""Whole moves between two hosts in memory, read as transcripts."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.moves import POSTCOPY, before
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.migration.inventory import MachineState
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import TERMINAL, Phase
from vmferry.model.pager import MemoryErrorFound
from vmferry.testing.host import Pair
from vmferry.units import Gpa


async def test_the_vm_moves(pair: Pair) -> None:
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code, job.progress.push) == (Phase.COMPLETED, None, 16)
    assert not pair.source.alive
    assert pair.destination.runs
    assert not pair.a.pagers.running
    assert pair.a.script.transcript == [
        "store.life",
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
        "store.reserve",
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


async def test_the_ledger_travels_and_grows(pair: Pair) -> None:
    assert pair.b.service is not None
    pair.b.pagers.arrives = False
    known = LedgerEntry(Gpa(0x5000), Origin.VMM, guest_visible=True, severity=Severity.ACTION_REQUIRED)
    await pair.service.record_vmm_errors("web", [known])
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
    # Pages are poisoned, so pager and uffd stay as guards.
    assert "vmm.migration_complete True" in pair.b.script.transcript
    assert "m1-destination" in pair.b.pagers.running


async def test_an_error_is_durable_before_it_is_told(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=POSTCOPY)
    pair.a.script.fail_at("store.errors", VmferryError(Reason.STORE_FAILED, "disk full."))
    with pytest.raises(VmferryError):
        await pair.service.record_vmm_errors("web", [LedgerEntry(Gpa(0x1000), Origin.VMM)])
    assert not pair.a.pagers.running["m1-source"].poisoned


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


async def test_graceful_stop_cancels_migrations_that_may_be_cancelled(pair: Pair) -> None:
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
