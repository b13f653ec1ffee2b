"""The service: refusals, lists and watches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tests.support.moves import come
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.environment import Environment
from vmferry.migration.inventory import MachineState
from vmferry.migration.service import MigrationService
from vmferry.migration.source.job_feed import BATCH, JobFeed
from vmferry.migration.source.job_runner import JobRunner
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Job, PageProgress, Phase
from vmferry.model.vmm import DEVICE_STATE_LIMIT
from vmferry.testing.host import FakeHost, Pair
from vmferry.testing.peer import FakePeers
from vmferry.testing.store import MemoryStore
from vmferry.units import Gpa


async def refused(pair: Pair, migration: str, vm: str, destination: str = "b") -> Reason:
    with pytest.raises(VmferryError) as caught:
        await pair.service.create(migration, vm, destination)
    return caught.value.reason


async def test_create_is_idempotent(pair: Pair) -> None:
    first = await pair.service.create("m1", "web", "b")
    again = await pair.service.create("m1", "web", "b")
    assert (again.migration, again.created_us) == (first.migration, first.created_us)
    assert await refused(pair, "m1", "web", "c") is Reason.MIGRATION_EXISTS
    done = await pair.a.job_where("m1")
    assert await pair.service.create("m1", "web", "b") == done


async def test_requests_that_cannot_be_carried_out_are_refused(pair: Pair) -> None:
    pair.a.add_vmm("db", "stopped", 5)
    pair.a.add_vmm("new", "incoming", 6)
    assert await refused(pair, "M1", "web") is Reason.INVALID_ARGUMENT
    assert await refused(pair, "m1", "nobody") is Reason.VM_UNKNOWN
    assert await refused(pair, "m1", "db") is Reason.VM_NOT_RUNNING
    assert await refused(pair, "m1", "new") is Reason.VM_NOT_RUNNING
    pair.a.script.hang_at("peer.prepare")
    await pair.service.create("m1", "web", "b")
    assert await refused(pair, "m2", "web") is Reason.VM_ALREADY_MIGRATING
    assert [job.migration for job in await pair.service.jobs()] == ["m1"]


async def test_two_creates_at_once_make_one_job(pair: Pair) -> None:
    pair.a.script.hang_at("peer.prepare")
    made = await asyncio.gather(
        *(pair.service.create(f"m{number}", "web", "b") for number in range(5)), return_exceptions=True
    )
    assert sum(isinstance(one, Job) for one in made) == 1


@pytest.mark.parametrize(
    ("vm", "state", "platform", "reason"),
    [
        ("web", "running", "x86_64/process", Reason.DESTINATION_HAS_VM),
        ("other", "incoming", "x86_64/process", Reason.DESTINATION_NO_VMM),
        ("web", "incoming", "x86_64/kvm", Reason.PLATFORM_MISMATCH),
    ],
)
async def test_requests_that_a_destination_refuses(
    pair: Pair, vm: str, state: str, platform: str, reason: Reason
) -> None:
    pair.b.vmms.everyone.clear()
    pair.b.add_vmm(vm, state, 300, platform)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, reason)
    assert pair.source.runs
    assert not pair.b.pagers.running


class Starts:
    """Adds a VMM that waits for each VM that it is asked for."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.asked: list[tuple[str, str]] = []

    async def start(self, vm: str, platform: str) -> None:
        self.asked.append((vm, platform))
        self._host.add_vmm(vm, "incoming", 301, platform)


async def test_a_destination_starts_a_vmm_only_where_none_waits(pair: Pair) -> None:
    starter = Starts(pair.b)
    pair.b.starter = starter
    await pair.b.stop()
    await pair.b.start()
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert not starter.asked


async def test_a_destination_starts_the_vmm_of_a_vm_that_comes(pair: Pair) -> None:
    pair.b.vmms.everyone.clear()
    starter = Starts(pair.b)
    pair.b.starter = starter
    await pair.b.stop()
    await pair.b.start()
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    assert starter.asked == [("web", "x86_64/process")]


async def test_a_device_state_that_cannot_move_is_refused_before_there_is_a_job(pair: Pair) -> None:
    pair.source.may_have_state_of(DEVICE_STATE_LIMIT + 1)
    with pytest.raises(VmferryError) as caught:
        await pair.service.create("m1", "web", "b")
    assert caught.value.reason is Reason.STATE_TOO_LARGE
    assert f"{DEVICE_STATE_LIMIT + 1} bytes" in caught.value.message
    assert await pair.service.jobs() == []
    pair.source.may_have_state_of(DEVICE_STATE_LIMIT)
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_machines_during_a_move(pair: Pair) -> None:
    assert pair.b.service is not None
    assert [(one.vm, one.state) for one in await pair.service.machines()] == [("web", MachineState.RUNNING)]
    assert (await pair.b.service.machine("web")).state is MachineState.INCOMING
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    here = await pair.service.machine("web")
    assert (here.state, here.migration) == (MachineState.MOVED, "m1")
    there = await pair.b.service.machine("web")
    assert (there.state, there.migration, there.vmm_pid) == (MachineState.MIGRATING_IN, "m1", 200)
    pair.source.die()
    assert (await pair.service.machine("web")).state is MachineState.DISCONNECTED
    with pytest.raises(VmferryError) as caught:
        await pair.service.machine("nobody")
    assert caught.value.reason is Reason.VM_UNKNOWN


async def test_a_reported_error_needs_memory_and_a_vm(pair: Pair) -> None:
    entry = await pair.service.report_error("web", 0x1234, 0)
    assert (entry.gpa, entry.lsb, entry.origin) == (0x1000, 12, Origin.OPERATOR)
    assert await pair.service.ledger("web") == [entry]
    for vm, gpa, reason in (("web", 1 << 40, Reason.INVALID_ARGUMENT), ("nobody", 0, Reason.VM_UNKNOWN)):
        with pytest.raises(VmferryError) as caught:
            await pair.service.report_error(vm, gpa, 0)
        assert caught.value.reason is reason


async def test_a_vmms_error_waits_for_the_recovery_and_is_forwarded(pair: Pair) -> None:
    """A VMM connects again before the restarted daemon knows the pagers that serve it."""
    pair.a.pagers.arrives = pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    await pair.b.kill()
    host = pair.b
    service = MigrationService(
        Environment(
            host="b",
            store=host.store,
            vmms=host.vmms,
            pagers=host.pagers,
            peers=FakePeers(host.script, pair.network.find),
            clock=pair.network.clock,
        )
    )
    host._renew_script()
    early = asyncio.create_task(service.record_vmm_errors("web", [LedgerEntry(Gpa(4096), Origin.VMM)]))
    await asyncio.sleep(0.01)
    assert not early.done()
    async with service:
        await early
        assert set(host.pagers.running["m1-destination"].poisoned) == {4096}


async def test_watch_ends_with_the_job_and_has_every_revision(pair: Pair) -> None:
    await pair.service.create("m1", "web", "b")
    seen = [job async for job in pair.service.watch("m1", 0)]
    phases = list(dict.fromkeys(job.phase for job in seen))
    assert phases == [Phase.QUEUED, Phase.PREPARING, Phase.SWITCHOVER, Phase.POSTCOPY, Phase.COMPLETED]
    assert [job.revision for job in seen] == sorted(job.revision for job in seen)
    assert [job async for job in pair.service.watch("m1", 0)][-1] == seen[-1]
    assert [job async for job in pair.service.watch("m1", seen[-1].revision)] == []


async def test_watch_of_an_unknown_migration(pair: Pair) -> None:
    with pytest.raises(VmferryError) as caught:
        await anext(pair.service.watch("m9", 0))
    assert caught.value.reason is Reason.MIGRATION_UNKNOWN


async def test_watch_misses_nothing_under_concurrent_writes() -> None:
    jobs = JobFeed(MemoryStore())
    writers, writes = 8, 40

    async def write(number: int) -> None:
        job = Job(f"m{number}", "web", "b")
        for _ in range(writes):
            job = await jobs.save(job)
            job = jobs.show_progress(job, PageProgress(total=job.revision), 0)

    async def watch(after: int) -> list[int]:
        revisions: list[int] = []
        async for job in jobs.watch("", after):
            if job.revision > after:
                revisions.append(job.revision)
            if job.revision == writers * writes:
                return revisions
        raise AssertionError("the stream ended")

    async with asyncio.TaskGroup() as tasks:
        watchers = [tasks.create_task(watch(after), name=f"after {after}") for after in (0, 7, 100)]
        for number in range(writers):
            tasks.create_task(write(number), name=f"writer {number}")
    for task, after in zip(watchers, (0, 7, 100), strict=True):
        assert sorted(set(task.result())) == list(range(after + 1, writers * writes + 1))


async def test_watchers_read_the_store_for_written_changes_and_not_for_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise each watcher would read it ten times a second for each moving VM."""
    store = MemoryStore()
    jobs, reads = JobFeed(store), 0
    look = store.job_revisions

    async def job_revisions(after: int, limit: int) -> Sequence[Job]:
        nonlocal reads
        reads += 1
        return await look(after, limit)

    monkeypatch.setattr(store, "job_revisions", job_revisions)
    job = await jobs.save(Job("m1", "web", "b"))
    stream = jobs.watch("m1", 0)
    assert await anext(stream) == job
    for done in range(1, 50):
        shown = jobs.show_progress(job, PageProgress(total=50, push=done), 0)
        assert await anext(stream) == shown
    assert reads == 1
    saved = await jobs.save(job)
    assert await anext(stream) == saved
    assert reads == 2


async def test_more_revisions_than_are_read_at_once_are_all_seen() -> None:
    jobs = JobFeed(MemoryStore())
    for _ in range(2 * BATCH):
        job = await jobs.save(Job("m1", "web", "b"))
    stream = jobs.watch("m1", 0)
    assert [(await anext(stream)).revision for _ in range(2 * BATCH)] == list(range(1, job.revision + 1))


async def test_progress_comes_under_an_unchanged_revision() -> None:
    jobs = JobFeed(MemoryStore())
    job = await jobs.save(Job("m1", "web", "b"))
    stream = jobs.watch("m1", 0)
    assert await anext(stream) == job
    shown = jobs.show_progress(job, PageProgress(total=3), 1)
    assert await anext(stream) == shown
    assert shown.revision == job.revision
    assert await jobs.get("m1") == shown


async def test_watch_errors_misses_nothing_under_concurrent_writes() -> None:
    errors = LedgerRecorder(MemoryStore())

    async def record(vm: str) -> None:
        for page in range(50):
            await errors.record(vm, [LedgerEntry(Gpa(page * 4096), Origin.VMM)])

    async def watch(vm: str, count: int) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        async for _, name, entry in errors.watch(vm, 0):
            found.append((name, entry.gpa))
            if len(found) == count:
                break
        return found

    async with asyncio.TaskGroup() as tasks:
        every = tasks.create_task(watch("", 100), name="all")
        one = tasks.create_task(watch("db", 50), name="db")
        for vm in ("web", "db"):
            tasks.create_task(record(vm), name=vm)
    assert len(set(every.result())) == 100
    assert one.result() == [("db", page * 4096) for page in range(50)]


@pytest.mark.parametrize("step", ["store.job QUEUED", "store.job QUEUED answered"])
async def test_caller_that_goes_away_in_the_middle_of_create_leaves_no_job_that_nobody_runs(
    pair: Pair, step: str
) -> None:
    pair.a.script.hang_at("store.job QUEUED", after=step.endswith("answered"))
    asking = asyncio.create_task(pair.service.create("m1", "web", "b"))
    await pair.a.script.hung.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    pair.a.script.release()
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED


async def test_a_reported_error_reaches_the_pager_though_its_caller_goes_away(pair: Pair) -> None:
    pair.a.pagers.arrives = pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    assert pair.b.service is not None
    pair.b.script.hang_at("store.errors", after=True)
    reporting = asyncio.create_task(pair.b.service.report_error("web", 0x1000, 0))
    await pair.b.script.hung.wait()
    reporting.cancel()
    pair.b.script.release()
    await come(lambda: 0x1000 in pair.b.pagers.running["m1-destination"].poisoned)


async def test_a_defect_before_the_commit_is_the_reason_of_the_job(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: JobRunner, step: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(JobRunner, "_perform", broken)
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.INTERNAL)
    assert "RuntimeError('a bug')" in job.reason
    assert pair.source.runs
