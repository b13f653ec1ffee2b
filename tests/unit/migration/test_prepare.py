"""Prepare: the destination allocates the held memory, and connects the lanes, before the blackout."""

from __future__ import annotations

import os

import pytest

from tests.support.moves import POSTCOPY, before
from vmferry.errors import Reason
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.environment import Environment
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.steps import SourceSteps
from vmferry.migration.timeouts import Timeouts
from vmferry.model.allocation import LEAST_BYTES_PER_S, held_bytes
from vmferry.model.memory import Backing, MemoryKind, MemoryRoom
from vmferry.model.migration import Job, Phase
from vmferry.testing.host import Pair
from vmferry.testing.pager import HELD
from vmferry.testing.peer import FakePeers
from vmferry.units import MIB, PAGE_2M, PAGE_4K


async def test_held_memory_is_preallocated_before_prepare_is_answered(pair: Pair) -> None:
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
    """The step's own deadline grows with the guest's memory: the source lists it, and the destination allocates it."""
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
    assert steps.limit_s(m.RequestPrepare()) == Timeouts().step_s + 2 * 64 * MIB / LEAST_BYTES_PER_S
    assert steps.limit_s(m.AttachMemory()) == Timeouts().step_s


async def test_the_lane_is_connected_before_the_vm_is_stopped(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert "pager.connect_lanes" in pair.b.script.transcript
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


@pytest.mark.parametrize(
    ("kind", "payer", "needed", "words"),
    [
        (MemoryKind(PAGE_4K, Backing.MEMFD), os.getpid(), held_bytes(HELD), "web needs 0 MiB charged to the daemon"),
        (MemoryKind(PAGE_4K, Backing.ANONYMOUS), 200, held_bytes(HELD), "web needs 0 MiB charged to the VMM"),
        (
            MemoryKind(PAGE_2M, Backing.MEMFD),
            os.getpid(),
            PAGE_2M,
            "web needs 2 MiB in pages of 2 MiB charged to the d",
        ),
        (MemoryKind(PAGE_2M, Backing.ANONYMOUS), os.getpid(), PAGE_2M, "2 MiB in pages of 2 MiB charged to the daemon"),
        (MemoryKind(PAGE_4K, Backing.ANONYMOUS), None, held_bytes(HELD), "web needs 0 MiB, and the narrow place has"),
        (MemoryKind(PAGE_2M, Backing.ANONYMOUS), None, PAGE_2M, "2 MiB in pages of 2 MiB, and the narrow place has"),
    ],
    ids=["memfd", "anonymous", "huge-memfd", "huge-anonymous", "host", "host-huge"],
)
async def test_a_limit_without_room_refuses_while_the_vm_runs(
    pair: Pair, kind: MemoryKind, payer: int | None, needed: int, words: str
) -> None:
    """One byte too few, for the process that pays, or for the whole host (None)."""
    pair.destination.make_memory_of(kind)
    assert kind.page_size is not None
    narrow = MemoryRoom("the narrow place", 2 * MIB, needed - 1)
    if payer is None:
        pair.b.memory_rooms.host[kind.page_size] = narrow
    else:
        pair.b.memory_rooms.processes[payer, kind.page_size] = narrow
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.DESTINATION_NO_MEMORY)
    assert words in job.reason
    assert "vmm.stop" not in pair.a.script.transcript
    assert pair.source.runs
    assert pair.nothing_left()


async def test_a_limit_with_room_lets_the_vm_in(pair: Pair) -> None:
    enough = MemoryRoom("a wide place", 1 << 40, held_bytes(HELD))
    pair.b.memory_rooms.host = {PAGE_4K: enough}
    pair.b.memory_rooms.processes = dict.fromkeys(((os.getpid(), PAGE_4K), (200, PAGE_4K)), enough)
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
