"""Each request and each end of an incoming migration goes through the state machine, and each command is performed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.migration.destination import state_machine as inc
from vmferry.migration.destination.incoming_migration import IncomingMigration
from vmferry.migration.destination.incoming_service import IncomingService
from vmferry.model.incoming import Wanted
from vmferry.model.migration import Incoming, Outcome, Phase
from vmferry.model.pager import MemoryDetached
from vmferry.testing.host import Pair
from vmferry.testing.vmm import LAYOUT

WANTED = Wanted(vm="web", layout=LAYOUT, vcpus=2, platform="x86_64/process", lane_address="a:1", lane_token="t")

Door = Callable[[IncomingService, IncomingMigration], Awaitable[object]]

DOORS: dict[str, tuple[inc.Command, Door]] = {
    "prepare": (inc.StartVcpus(), lambda service, _: service.prepare("m1", WANTED)),
    "ready": (inc.StartVcpus(), lambda service, _: service.ready("m1", b"", [])),
    "start": (inc.GiveBack(), lambda service, _: service.start("m1")),
    "refuse": (inc.StartVcpus(), lambda service, _: service.refuse("m1", "why")),
    "vm died": (inc.SaveGuard(), lambda service, incoming: service._vm_died(incoming, "why")),
    "all arrived": (inc.StartVcpus(), lambda service, incoming: service._all_arrived(incoming, 0)),
}


def incoming_of(pair: Pair) -> tuple[IncomingService, IncomingMigration]:
    assert pair.b.service is not None
    service = pair.b.service.incoming
    record = Incoming("m1", "web", "a", Outcome.UNKNOWN)
    return service, IncomingMigration(service._environment, service._recorder, record)


@pytest.mark.parametrize("door", DOORS)
async def test_a_command_that_nothing_performs_raises(pair: Pair, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command, call = DOORS[door]
    service, incoming = incoming_of(pair)
    monkeypatch.setattr(inc, "answer", lambda state, _event, _migration: inc.Answer(state, (command,)))
    with pytest.raises(AssertionError, match=f"nothing performs {type(command).__name__}"):
        await call(service, incoming)


async def test_a_lost_vm_is_never_completed(pair: Pair) -> None:
    """The last page may arrive while the VMM dies."""
    service, incoming = incoming_of(pair)
    incoming.record = replace(incoming.record, outcome=Outcome.RUNNING)
    await service._vm_died(incoming, "killed by signal 9")
    await service._all_arrived(incoming, 3)
    assert (incoming.state, incoming.record.lost_reason) == (inc.State.LOST, "killed by signal 9")
    assert [entry.kind for entry in await pair.b.store.journal("m1")] == ["lost"]


async def test_a_loss_that_a_crash_cut_off_removes_the_pager(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    pair.b.script.hang_at("store.journal lost", after=True)
    pair.destination.die("killed by signal 9")
    pager = pair.b.pagers.running["m1-destination"]
    pager.state = replace(pager.state, memory_attached=False)
    pager.emit(MemoryDetached("killed by signal 9"))
    await pair.b.script.hung.wait()
    await pair.b.kill()
    assert pair.b.pagers.running
    await pair.b.start()
    assert (await pair.a.job_where("m1")).phase is Phase.LOST
    while pair.b.pagers.running:
        await pair.network.clock.sleep(0.01)


async def test_vmm_whose_connection_ends_at_migration_complete_never_holds_the_event_loop(pair: Pair) -> None:
    gone = VmferryError(Reason.VMM_GONE, "the VMM broke the connection.")
    pair.b.script.fail_at("vmm.migration_complete False", gone, times=200)
    began = pair.network.clock.monotonic_s()
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert pair.network.clock.monotonic_s() - began > 100.0, "the attempts pause between each other"


async def test_unexpected_fault_in_the_watch_is_told_and_does_not_end_it(pair: Pair) -> None:
    pair.b.script.fail_at("pager.complete", RuntimeError("a defect"), times=2)
    await pair.service.create("m1", "web", "b")
    seen: list[str] = []
    async with asyncio.timeout(patient(30)):
        async for job in pair.service.watch("m1", 0):
            seen.append(job.reason)
            if job.phase is Phase.COMPLETED:
                break
    assert any("a fault of its own: RuntimeError('a defect')" in reason for reason in seen)
