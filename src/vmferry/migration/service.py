"""The core's interface for `api/`, `ops/` and the wiring.

As a context it recovers the state of an earlier daemon, runs jobs, and stops gracefully.

    async with MigrationService(environment) as service:
        …    # serve `service` (API), `service.incoming` (Peer), `service.record_vmm_errors` (VMMs)

Every method raises `VmferryError` with the reason for the caller.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import structlog

from vmferry.aio.change_signal import ChangeSignal
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.destination.incoming_service import IncomingService
from vmferry.migration.environment import Environment
from vmferry.migration.inventory import Machine, machines
from vmferry.migration.move_book import MoveBook
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.job_feed import JobFeed
from vmferry.migration.source.job_record import ended
from vmferry.migration.source.job_runner import JobRunner
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Incoming, Job, Outcome, Phase, course_with
from vmferry.model.names import MIGRATION_ID, is_migration_id
from vmferry.model.vmm import DEVICE_STATE_LIMIT, state_too_large
from vmferry.ports import Vmm
from vmferry.units import LSB_4K, Gpa

log = structlog.get_logger()

TASK_CRASHED = "service.task_crashed"
STOPPING = "service.stopping"
STILL_RUNNING = "service.left_running"


class MigrationService:
    """Owner of this host's jobs, incoming migrations and ledger, and of all their tasks."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._jobs = JobFeed(environment.store)
        self._recorder = LedgerRecorder(environment.store)
        self._runners: dict[str, JobRunner] = {}
        self._creating = asyncio.Lock()
        self._settled: dict[str, Vmm] = {}
        """The running VMMs that `_settle_life` has seen, by VM."""
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._ended = ChangeSignal()
        self.recovered = asyncio.Event()
        """Set once the state of an earlier daemon is recovered."""
        self._chronicle = Chronicle(environment)
        self.incoming = IncomingService(environment, self._recorder, self._chronicle, self._spawn)
        """The operations for the Peer servicer: hello, prepare, ready, start, refuse, outcome, watch, finish."""
        self.moves = MoveBook(environment, self._jobs, self._runners, self.incoming, self._chronicle)
        """The facts of all migrations, for people."""

    async def __aenter__(self) -> MigrationService:
        await self._tasks.__aenter__()
        await self.incoming.recover()
        await self._jobs.load()
        for job in await self._jobs.active():
            await self._recover(job)
        self._spawn("events", self._chronicle.run())
        self._spawn("history", self.moves.prune(self._environment.history))
        self.recovered.set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.stop()
        finally:
            for task in list(self._running):
                task.cancel()
            await self._tasks.__aexit__(kind, error, trace)

    async def stop(self) -> None:
        """Takes no new jobs, cancels those before the commit, and waits for the others up to `Timeouts.stop_s`.

        The next daemon continues the rest: pagers outlive this process.
        """
        self._stopping = True
        asked = m.CancelRequested(Reason.SHUTTING_DOWN, "the source's daemon was stopped before the commit")
        log.info(STOPPING, jobs=sorted(self._runners))
        try:
            async with asyncio.timeout(self._environment.timeouts.stop_s):
                for runner in list(self._runners.values()):
                    if runner.cancellable:
                        await self._cancel_quietly(runner, asked)
                while self._runners:
                    await self._ended.wait_after(self._ended.count)
        except TimeoutError:
            log.warning(STILL_RUNNING, jobs=sorted(self._runners))
        await self._chronicle.flush()

    # jobs

    async def create(
        self, migration: str, vm: str, destination: str, push_bytes_per_s: int = 0, requested_by: str = ""
    ) -> Job:
        """Makes the job durable; the move then runs by itself.

        A repeated request (same migration, VM and destination) returns the job as it is now, at any push limit. A limit
        of 0 is the configured one.

        Raises: VmferryError INVALID_ARGUMENT, MIGRATION_EXISTS, VM_UNKNOWN, VM_NOT_RUNNING, VM_ALREADY_MIGRATING,
        STATE_TOO_LARGE, SHUTTING_DOWN.
        """
        if not is_migration_id(migration):
            raise VmferryError(
                Reason.INVALID_ARGUMENT, f"migration id {migration!r}.", f"It must match {MIGRATION_ID}."
            )
        # A caller that goes away, or whose deadline passes, must not leave a durable job that nobody runs.
        return await asyncio.shield(self._create(migration, vm, destination, push_bytes_per_s, requested_by))

    async def validate(self, vm: str, destination: str) -> str:
        """Checks as `create` does, and returns the name of the destination, which answers. Changes nothing.

        Raises: VmferryError VM_UNKNOWN, VM_NOT_RUNNING, VM_ALREADY_MIGRATING, SHUTTING_DOWN, DESTINATION_UNREACHABLE, …
        """
        await self._check_movable(vm)
        peer = self._environment.peers.connect(destination, secrets.token_hex(16))
        try:
            return await peer.hello(f"check-{secrets.token_hex(8)}")
        finally:
            await peer.close()

    async def _create(self, migration: str, vm: str, destination: str, push_bytes_per_s: int, requested_by: str) -> Job:
        async with self._creating:
            known = await self._jobs.find(migration)
            if known is not None:
                if (known.vm, known.destination) == (vm, destination):
                    return await self._jobs.get(migration)
                raise VmferryError(
                    Reason.MIGRATION_EXISTS,
                    f"{migration} exists and moves {known.vm} to {known.destination}.",
                    "Choose another migration id.",
                )
            await self._check_movable(vm)
            await self._settle_life(vm)
            now = self._environment.clock.now_us()
            errors = await self._recorder.count(vm)
            limit = push_bytes_per_s or self._environment.push_bytes_per_s
            job = Job(
                migration,
                vm,
                destination,
                created_us=now,
                updated_us=now,
                memory_errors=errors,
                nonce=secrets.token_hex(16),
                requested_by=requested_by,
                course=course_with((), Phase.QUEUED, now),
            )
            job = await self._jobs.save(replace(job, push_bytes_per_s=limit))
            self._chronicle.note(migration, "created", f"by {requested_by}" if requested_by else "")
            self._start_runner(job, None)
            return job

    async def job(self, migration: str) -> Job:
        """Raises: VmferryError MIGRATION_UNKNOWN."""
        return await self._jobs.get(migration)

    async def jobs(self) -> Sequence[Job]:
        """All jobs, oldest first."""
        return await self._jobs.all()

    def watch(self, migration: str, after_revision: int) -> AsyncIterator[Job]:
        """As `JobFeed.watch`; "" watches all."""
        return self._jobs.watch(migration, after_revision)

    async def watch_from_now(self) -> AsyncIterator[Job]:
        """Yields each job under way as it is, then every later revision of all, without end."""
        at = self._jobs.newest_revision
        for job in await self._jobs.active():
            yield job
        async for job in self._jobs.watch("", at):
            yield job

    async def cancel(self, migration: str) -> Job:
        """Returns once the VM runs on the source again. Raises: VmferryError MIGRATION_UNKNOWN, PAST_NO_RETURN."""
        runner = self._runners.get(migration)
        if runner is not None:
            return await runner.cancel(m.CancelRequested())
        job = await self._jobs.get(migration)
        if m.State(job.phase.value) in (m.State.CANCELLED, m.State.FAILED):
            return job
        raise m.IllegalEventError(m.State(job.phase.value), m.CancelRequested(), m.CANCELLABLE)

    async def set_push_limit(self, migration: str, push_bytes_per_s: int) -> Job:
        """Limits the job's background push, bytes per second; 0: no limit. The limit is durable when this returns.

        Raises: VmferryError MIGRATION_UNKNOWN, MIGRATION_ENDED, STORE_FAILED.
        """
        runner = self._runners.get(migration)
        if runner is not None:
            return await runner.push_limit.change(push_bytes_per_s)
        raise ended(await self._jobs.get(migration))

    # machines and their memory errors

    async def machines(self) -> Sequence[Machine]:
        identities = [vmm.identity for vmm in self._environment.vmms.all()]
        jobs = await self._jobs.active()
        incomings = self.incoming.active()
        with suppress(VmferryError):  # A list can be read while nothing can be written.
            for identity in identities:
                await self._settle_life(identity.vm)
        vms = {one.vm for one in identities} | {job.vm for job in jobs} | {record.vm for record in incomings}
        counts = {vm: await self._recorder.count(vm) for vm in vms}
        return machines(identities, jobs, incomings, counts)

    async def machine(self, vm: str) -> Machine:
        """Raises: VmferryError VM_UNKNOWN."""
        for found in await self.machines():
            if found.vm == vm:
                return found
        raise unknown_vm(vm)

    async def incomings(self) -> Sequence[Incoming]:
        return self.incoming.all()

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """The memory errors of a VM by GPA. Raises: VmferryError VM_UNKNOWN."""
        await self._settle_life(vm)
        found = await self._recorder.ledger(vm)
        if not found:
            await self._check_known(vm)
        return found

    async def ledger_of_known(self, vm: str) -> Sequence[LedgerEntry]:
        """The memory errors of a VM of `machines`, by GPA."""
        return await self._recorder.ledger(vm)

    async def watch_errors(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """Yields (revision, vm, entry) after a revision, then live. "" watches all VMs. Raises: VmferryError
        VM_UNKNOWN.
        """
        if vm:
            await self.ledger(vm)
        async for change in self._recorder.watch(vm, after_revision):
            yield change

    async def report_error(self, vm: str, gpa: int, lsb: int) -> LedgerEntry:
        """Records an error that only the operator knows. It is durable when this returns.

        Raises: VmferryError VM_UNKNOWN, INVALID_ARGUMENT: no memory there.
        """
        layout = (await self.machine(vm)).layout
        size = 1 << (lsb or LSB_4K)
        address = Gpa(gpa - gpa % size)
        if layout.regions and not layout.contains(address):
            raise VmferryError(
                Reason.INVALID_ARGUMENT,
                f"{vm} has no memory at guest-physical address {gpa:#x}.",
                "The regions that it has are in `layout` of GetMachine, or of `vmferry machines --json`.",
            )
        now = self._environment.clock.now_us()
        entry = LedgerEntry(address, Origin.OPERATOR, lsb=lsb or LSB_4K, first_seen_us=now, last_seen_us=now)
        # A caller that goes away must not leave a durable error that no pager knows.
        changed = await asyncio.shield(self._recorder.record_and_forward(vm, [entry]))
        return changed[0] if changed else entry

    async def record_vmm_errors(self, vm: str, entries: Sequence[LedgerEntry]) -> None:
        """Records a VMM's `memory_error`s and forwards them to the pagers that serve the VM, on either side.

        They are durable when this returns. It waits for the recovery at the start, which finds those pagers.
        """
        await self.recovered.wait()
        await self._settle_life(vm)
        now = self._environment.clock.now_us()
        seen = [e if e.last_seen_us else replace(e, first_seen_us=now, last_seen_us=now) for e in entries]
        await self._recorder.record_and_forward(vm, seen)

    async def guest_was_reset(self, vm: str) -> None:
        """The guest of a VM on this host was reset. Its VMM has put fresh memory in the place of bad pages: its pagers
        look which. Raises: VmferryError PAGER_FAILED.
        """
        await self.recovered.wait()
        await self._recorder.forget_replaced(vm)

    async def _settle_life(self, vm: str) -> None:
        """Gives a VM that began here, in another process than before, a ledger of its own. Every use of a ledger calls
        it first.
        """
        vmm = self._environment.vmms.running(vm)
        if vmm is None or vmm.identity.state != "running" or self._settled.get(vm) is vmm:
            return
        life = self._environment.vmm_life(vmm.identity.pid)
        if life:
            await self._recorder.begin_life(vm, life, self.incoming.brought(vm, life))
        self._settled[vm] = vmm

    # tasks

    async def _check_movable(self, vm: str) -> None:
        if self._stopping:
            raise VmferryError(Reason.SHUTTING_DOWN, "this daemon is stopping.", "Ask again once it has restarted.")
        for job in await self._jobs.active():
            if job.vm == vm:
                raise VmferryError(
                    Reason.VM_ALREADY_MIGRATING,
                    f"{vm} is being moved by {job.migration} ({job.phase}).",
                    "Wait for it, or cancel it.",
                )
        held = self._environment.vmms.running(vm)
        if held is None and self._environment.vmms.incoming(vm) is None:
            raise unknown_vm(vm)
        if held is None or held.identity.state != "running":
            state = held.identity.state if held else "incoming"
            raise VmferryError(
                Reason.VM_NOT_RUNNING, f"{vm} is {state} on this host.", "Only a running VM can be moved."
            )
        if held.identity.state_bytes > DEVICE_STATE_LIMIT:
            raise state_too_large(vm, held.identity.state_bytes)
        for record in self.incoming.all():
            if record.vm == vm and record.outcome is Outcome.RUNNING and not record.lost_reason:
                raise VmferryError(
                    Reason.VM_ALREADY_MIGRATING,
                    f"{vm} is still arriving on this host by {record.migration}.",
                    "Wait until its memory is here.",
                )

    async def _check_known(self, vm: str) -> None:
        await self.machine(vm)

    async def _recover(self, job: Job) -> None:
        kinds = [entry.kind for entry in await self._environment.store.journal(job.migration)]
        step = m.recovered(job.phase, kinds)
        if step is not None:
            self._start_runner(job, step)

    def _start_runner(self, job: Job, recovered: m.Transition | None) -> None:
        runner = JobRunner(self._environment, self._jobs, self._recorder, self._chronicle, job, self._spawn)
        self._runners[job.migration] = runner
        self._spawn(f"migration {job.migration}", self._drive(runner, recovered))

    async def _drive(self, runner: JobRunner, recovered: m.Transition | None) -> None:
        """Runs the job to its end. A defect is logged, and the job continues as after a restart."""
        backoff = self._environment.backoff()
        migration = runner.job.migration
        while True:
            try:
                await runner.run(recovered)
            except Exception as error:
                log.exception(TASK_CRASHED, task=migration)
                why = f"the source's daemon met a fault of its own: {error!r}; see its log"
            else:
                break
            await backoff.pause()
            job = await self._environment.store.job(migration)
            kinds = [entry.kind for entry in await self._environment.store.journal(migration)]
            recovered = m.recovered(job.phase, kinds, Reason.INTERNAL, why) if job is not None else None
            if job is None or recovered is None:
                break
            runner = JobRunner(self._environment, self._jobs, self._recorder, self._chronicle, job, self._spawn)
            self._runners[migration] = runner
        self._runners.pop(migration, None)
        self._ended.notify()

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(self._guard(name, work), name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _guard(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Logs a defect of one task. Neither the daemon nor another job ends by it."""
        try:
            await work
        except Exception:
            log.exception(TASK_CRASHED, task=name)

    async def _cancel_quietly(self, runner: JobRunner, asked: m.CancelRequested) -> None:
        try:
            await runner.cancel(asked)
        except VmferryError as error:
            log.info(STILL_RUNNING, migration=runner.job.migration, reason=error.reason.value)


def unknown_vm(vm: str) -> VmferryError:
    return VmferryError(
        Reason.VM_UNKNOWN,
        f"no VMM of the name {vm!r} is connected to this daemon.",
        "List the machines; a VMM connects to the daemon's [vmm] socket.",
    )
