"""One migration id from two sources: ids are unique on one source only, and the second job must touch nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.incoming import Wanted
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Job, Outcome, Phase
from vmferry.testing.host import FakeHost, Pair
from vmferry.testing.vmm import LAYOUT, FakeVmm
from vmferry.units import Gpa

OTHER_JOB = "f" * 32
WANTED = Wanted(vm="db", layout=LAYOUT, vcpus=2, platform="x86_64/process", lane_address="a:1", lane_token="t")


@dataclass
class Third:
    """A second source, with a VM of its own that may have the first one's name."""

    host: FakeHost
    vmm: FakeVmm
    waiting: FakeVmm


@pytest.fixture(params=["another VM", "a VM of the same name"])
async def third(pair: Pair, request: pytest.FixtureRequest) -> AsyncIterator[Third]:
    vm = "db" if request.param == "another VM" else "web"
    host = pair.network.host("c")
    vmm = host.add_vmm(vm, "running", 300)
    waiting = pair.b.add_vmm(vm, "incoming", 400) if vm == "db" else pair.destination
    await host.start()
    yield Third(host, vmm, waiting)
    await host.kill()


async def hold(pair: Pair, step: str) -> None:
    """The first job stands at this step."""
    pair.a.script.hang_at(step)
    await pair.service.create("m1", "web", "b")
    async with asyncio.timeout(patient(30)):
        await pair.a.script.hung.wait()


async def move(host: FakeHost, vm: str) -> Job:
    assert host.service is not None
    await host.service.create("m1", vm, "b")
    return await host.job_where("m1")


async def test_second_job_of_an_id_fails_and_its_vm_runs_on(pair: Pair, third: Third) -> None:
    assert (await move(pair.a, "web")).phase is Phase.COMPLETED
    job = await move(third.host, third.vmm.identity.vm)
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.MIGRATION_EXISTS)
    assert (third.vmm.runs, pair.destination.runs, third.host.pagers.running) == (True, True, {})
    if third.waiting is not pair.destination:
        assert third.waiting.identity.state == "incoming"


@pytest.mark.parametrize("held", ["peer.prepare answered", "peer.ready answered", "peer.start"])
async def test_second_job_changes_nothing_of_a_first_that_is_under_way(pair: Pair, third: Third, held: str) -> None:
    await hold(pair, held)
    job = await move(third.host, third.vmm.identity.vm)
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.MIGRATION_EXISTS)
    assert third.vmm.runs
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert (pair.destination.runs, pair.source.runs) == (True, False)


async def test_stranger_can_neither_start_nor_refuse_a_migration(pair: Pair) -> None:
    await hold(pair, "peer.start")
    assert pair.b.service is not None
    with pytest.raises(VmferryError) as caught:
        await pair.b.service.incoming.admit("m1", OTHER_JOB)
    assert caught.value.reason is Reason.MIGRATION_EXISTS
    assert "web from" in caught.value.message
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


@pytest.mark.parametrize("outcome", [Outcome.PREPARED, Outcome.COMPLETED, Outcome.REFUSED])
async def test_binding_outlives_the_destinations_daemon(pair: Pair, outcome: Outcome) -> None:
    if outcome is Outcome.COMPLETED:
        await move(pair.a, "web")
    else:
        await hold(pair, "peer.prepare answered")
    if outcome is Outcome.REFUSED:
        assert pair.b.service is not None
        await pair.b.service.incoming.refuse("m1", "not wanted")
    await pair.b.kill()
    service = await pair.b.start()
    assert (await service.incoming.outcome("m1"))[0] is outcome
    with pytest.raises(VmferryError, match="another job"):
        await service.incoming.admit("m1", OTHER_JOB)


async def test_repeated_prepare_for_another_vm_is_refused(pair: Pair) -> None:
    await hold(pair, "peer.prepare answered")
    assert pair.b.service is not None
    with pytest.raises(VmferryError, match="moves web to this host, not db"):
        await pair.b.service.incoming.prepare("m1", WANTED)


@pytest.mark.parametrize("restarted", [False, True], ids=["same daemon", "restarted daemon"])
async def test_repeated_prepare_is_done_only_if_it_asks_for_the_same(pair: Pair, restarted: bool) -> None:
    assert pair.b.service is not None
    wanted = replace(WANTED, vm="web")
    await pair.b.service.incoming.prepare("m1", wanted)
    if restarted:
        await pair.b.kill()
        await pair.b.start()
    service = pair.b.service.incoming
    await service.prepare("m1", replace(wanted, ledger=(LedgerEntry(Gpa(0), Origin.VMM),)))
    for other in ({"platform": "x86_64/kvm"}, {"lane_token": "another"}, {"vcpus": 7}):
        with pytest.raises(VmferryError, match="another layout, platform or lane") as caught:
            await service.prepare("m1", replace(wanted, **other))  # type: ignore[arg-type]
        assert caught.value.reason is Reason.MIGRATION_EXISTS
