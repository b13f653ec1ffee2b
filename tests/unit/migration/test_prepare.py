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
from vmferry.units import MIB


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


async def test_the_lane_is_connected_before_the_vm_stands_still(pair: Pair) -> None:
    pair.a.script.hang_at("vmm.stop")
    await pair.service.create("m1", "web", "b")
    await pair.a.script.hung.wait()
    assert "pager.connect_lanes" in pair.b.script.transcript
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


@pytest.mark.parametrize(
    ("backing", "words"),
    [
        (Backing.MEMFD, "the daemon and its pagers"),
        (Backing.ANONYMOUS, "the VMM"),
    ],
)
async def test_a_cgroup_without_room_refuses_while_the_vm_runs(pair: Pair, backing: Backing, words: str) -> None:
    pair.destination.make_memory_of(MemoryKind(backing=backing))
    payer = os.getpid() if backing is Backing.MEMFD else pair.destination.identity.pid
    pair.b.memory_room[payer] = MemoryRoom("/sys/fs/cgroup/machine", 2 * MIB, held_bytes(HELD) - 1)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.DESTINATION_NO_MEMORY)
    assert f"is charged to {words}, and the cgroup /sys/fs/cgroup/machine has" in job.reason
    assert "vmm.stop" not in pair.a.script.transcript
    assert pair.source.runs
    assert pair.nothing_left()


async def test_a_cgroup_with_room_lets_the_vm_in(pair: Pair) -> None:
    pair.b.memory_room = dict.fromkeys((os.getpid(), 200), MemoryRoom("/g", 1 << 40, held_bytes(HELD)))
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
