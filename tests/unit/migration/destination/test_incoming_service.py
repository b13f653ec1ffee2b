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
from vmferry.model.journal import JournalEntry
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
    return service, IncomingMigration(service._environment, service._recorder, service._chronicle, record)


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
    pair.b.script.fail_at("pager.complete", RuntimeError("a defect"), times=1_000_000)
    await pair.service.create("m1", "web", "b")
    paused = await pair.a.job_where("m1", phases=frozenset({Phase.POSTCOPY_PAUSED}))
    assert "a fault of its own: RuntimeError('a defect')" in paused.reason
    pair.b.script.faults.clear()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def cancelled_at(pair: Pair, step: str, call: Callable[[], Awaitable[object]]) -> None:
    """Cancels a call once this step has had its effect, as a source does that goes away."""
    pair.b.script.hang_at(step, after=True)
    calling = asyncio.ensure_future(call())
    async with asyncio.timeout(patient(20)):
        await pair.b.script.hung.wait()
        calling.cancel()
        pair.b.script.release()
        with pytest.raises(asyncio.CancelledError):
            await calling


async def prepared(pair: Pair, door: str) -> tuple[IncomingService, IncomingMigration]:
    """The incoming migration right before a request."""
    assert pair.b.service is not None
    service = pair.b.service.incoming
    await service.prepare("m1", WANTED, "a")
    if door != "refused":
        await service.ready("m1", b"state", [])
    return service, await service._load("m1")


async def test_a_start_whose_caller_goes_away_is_not_refused_after_it(pair: Pair) -> None:
    """`running` is durable: a Refuse that comes next must find it, or two copies run."""
    service, incoming = await prepared(pair, "running")
    await pair.source.stop()
    await pair.a.store.append_journal(JournalEntry("m1", "commit", 0, {}))
    await cancelled_at(pair, "store.journal running", lambda: service.start("m1"))
    assert incoming.state is inc.State.RUNNING
    with pytest.raises(VmferryError) as caught:
        await service.refuse("m1", "the source wants it back")
    assert caught.value.reason is Reason.MIGRATION_RUNNING
    assert "refused" not in pair.b.store.kinds()


async def test_a_refusal_whose_caller_goes_away_gives_everything_back(pair: Pair) -> None:
    service, incoming = await prepared(pair, "refused")
    await cancelled_at(pair, "store.journal refused", lambda: service.refuse("m1", "cancelled"))
    assert incoming.state is inc.State.REFUSED
    assert not pair.b.pagers.running
    assert pair.destination.identity.state == "incoming"


@pytest.mark.parametrize("error", [None, VmferryError(Reason.STORE_FAILED, "disk full")], ids=["cancelled", "store"])
async def test_a_prepare_that_ends_at_its_first_write_frees_the_vms_name(
    pair: Pair, error: VmferryError | None
) -> None:
    assert pair.b.service is not None
    service = pair.b.service.incoming
    if error is None:
        await cancelled_at(pair, "store.incoming UNKNOWN", lambda: service.prepare("m1", WANTED, "a"))
    else:
        pair.b.script.fail_at("store.incoming UNKNOWN", error, times=2)
        with pytest.raises(VmferryError, match="disk full"):
            await service.prepare("m1", WANTED, "a")
    await service.prepare("m2", WANTED, "a")
    assert (await service.outcome("m2"))[0] is Outcome.PREPARED
