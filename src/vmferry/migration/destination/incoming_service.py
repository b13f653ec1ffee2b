"""What the destination answers to the source's daemon: `peer/` calls these methods. Idempotent by migration.

A request is decided by `incoming.py` from the journal and done under the migration's lock. A Refuse does not wait for a
Prepare or Ready that hangs: it ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog

from vmferry.aio.concurrency import sooner
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import MemoryErrors
from vmferry.migration.destination import state_machine as inc
from vmferry.migration.destination.incoming_migration import Arrival, no_vmm
from vmferry.migration.destination.layout import check_layout
from vmferry.migration.destination.pager_watch import Following
from vmferry.migration.environment import Spawn, World
from vmferry.model.journal import JournalKind
from vmferry.model.migration import TERMINAL, Incoming, LedgerEntry, Outcome
from vmferry.ports import IncomingUpdate, Wanted

log = structlog.get_logger()

OUTCOME = "incoming.outcome"
CLEANING_FAILED = "incoming.cleaning_failed"

UPDATE_S = 0.1
"""At most 10 updates a second go to the source (peer.proto), until the end, which goes at once."""
CHANGES_AT_ONCE = 1000
"""Memory errors in one update."""
HOLDS_STATE = frozenset({"loaded", "running"})
"""States of a VMM that has taken the device state."""


class Arrivals:
    """Owner of this host's incoming migrations."""

    def __init__(self, world: World, errors: MemoryErrors, spawn: Spawn) -> None:
        self._world = world
        self._errors = errors
        self._spawn = spawn
        self._known: dict[str, Arrival] = {}

    async def take_up(self) -> None:
        """After a restart: goes on where the journal stands. A Prepare that was cut off is refused: nobody waits. A
        refusal that was cut off, which its record does not show yet, gives back what is left."""
        for record in await self._world.store.incomings():
            arrival = await self._load(record.migration)
            outcome = arrival.record.outcome
            if outcome is Outcome.UNKNOWN or (outcome is Outcome.REFUSED and record.outcome is not outcome):
                self._spawn(f"refuse {record.migration}", self._refuse_cut_off(arrival))
            elif outcome is not Outcome.REFUSED and not arrival.record.lost_reason:
                self._follow(arrival)

    def all(self) -> list[Incoming]:
        return [arrival.record for arrival in self._known.values() if arrival.record.vm]

    async def hello(self, migration: str) -> str:
        """Returns this host's name."""
        del migration
        return self._world.host

    async def prepare(self, migration: str, wanted: Wanted, source_host: str = "") -> None:
        """Raises: VmferryError DESTINATION_NO_VMM, DESTINATION_NO_MEMORY, DESTINATION_HAS_VM, PLATFORM_MISMATCH, …"""
        arrival = await self._load(migration)
        async with self._interruptible(arrival):
            found = inc.answer(arrival.record.outcome, inc.PrepareAsked(), migration)
            if not found.commands:
                return
            check_layout(wanted.layout)
            await self._check_vm(arrival, wanted.vm, wanted.platform)
            arrival.record = replace(arrival.record, vm=wanted.vm, source_host=source_host)
            await arrival.save()
            try:
                for command in found.commands:
                    await self._prepare_step(arrival, command, wanted)
                await arrival.save()
            except BaseException:
                await self._clean(arrival)
                raise
        self._follow(arrival)

    async def _prepare_step(self, arrival: Arrival, command: inc.Command, wanted: Wanted) -> None:
        match command:
            case inc.MakeMemory():
                await arrival.make_memory(wanted.layout, wanted.vcpus, wanted.held)
            case inc.TakeLedger():
                await arrival.take_ledger(wanted.ledger)
            case inc.ConnectLanes():
                await arrival.connect_lanes(wanted)
            case inc.Record(kind):
                await self._append(arrival, kind)
            case _:
                raise AssertionError(f"not a step of prepare: {command}")

    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None:
        """Known poison is durable and marked, and the device state loaded, when it returns."""
        arrival = await self._load(migration)
        self._world.processors.keep_awake(arrival.key)
        async with self._interruptible(arrival):
            found = inc.answer(arrival.record.outcome, inc.ReadyAsked(), migration)
            for command in found.commands:
                await self._ready_step(arrival, command, device_state, ledger)

    async def _ready_step(
        self, arrival: Arrival, command: inc.Command, device_state: bytes, ledger: Sequence[LedgerEntry]
    ) -> None:
        match command:
            case inc.TakeLedger():
                await arrival.mark_new(await arrival.take_ledger(ledger))
            case inc.CheckPager():
                await arrival.check_pager()
            case inc.LoadState():
                await arrival.load_state(device_state)
            case _:
                raise AssertionError(f"not a step of ready: {command}")

    async def start(self, migration: str) -> int:
        """Returns when the vCPUs were told to run, Unix microseconds."""
        arrival = await self._load(migration)
        async with arrival.lock:
            found = inc.answer(arrival.record.outcome, inc.StartAsked(), migration)
            for command in found.commands:
                match command:
                    case inc.CheckVmm():
                        await self._vmm_or_refuse(arrival)
                    case inc.Record(kind):
                        await self._append(arrival, kind)
                    case inc.StartVcpus():
                        await self._start_vcpus(arrival)
                    case _:
                        raise AssertionError(f"not a step of start: {command}")
            self._world.processors.let_sleep(arrival.key)
            return arrival.record.started_us

    async def refuse(self, migration: str, reason: str) -> None:
        """Raises: VmferryError MIGRATION_RUNNING."""
        arrival = await self._load(migration)
        if arrival.scope is not None:
            arrival.scope.reschedule(asyncio.get_running_loop().time())
        async with arrival.lock:
            await self._refuse(arrival, reason)

    async def outcome(self, migration: str) -> tuple[Outcome, str]:
        """What the journal says, read through the lock: not between a decision and its entry."""
        arrival = await self._load(migration)
        async with arrival.lock:
            return arrival.record.outcome, arrival.record.lost_reason or arrival.record.reason

    async def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]:
        """Progress, and every memory error once a stream; ends with COMPLETED, REFUSED or the loss of the VM."""
        arrival = await self._load(migration)
        if not arrival.record.vm:
            raise VmferryError(Reason.MIGRATION_UNKNOWN, f"{migration} never came to this host.", "")
        revision = 0
        read: int | None = None
        while True:
            seen = arrival.bell.count
            record = arrival.record
            changes: Sequence[tuple[int, str, LedgerEntry]] = ()
            if record.ended or read != self._errors.writes:  # at the end also what was written by nobody who came back
                read = self._errors.writes
                changes = await self._world.store.ledger_changes(record.vm, revision, CHANGES_AT_ONCE)
            if changes:
                revision = changes[-1][0]
                read = None if len(changes) == CHANGES_AT_ONCE else read  # there may be more
            errors = tuple(entry for _, _, entry in changes)
            last = record.ended and not changes
            outcome = record.outcome if last or not record.ended else Outcome.RUNNING
            lost = record.lost_reason if last else ""
            yield IncomingUpdate(outcome, record.progress, record.paused_reason, errors, lost)
            if last:
                return
            if not changes:
                await arrival.bell.after(seen)
            if not record.ended:
                await sooner(self._world.clock.sleep(UPDATE_S), arrival.until_ended())

    async def finish(self, migration: str) -> None:
        """The source is gone; what this host keeps, it keeps for itself (journal, ledger, poison guard)."""
        await self._load(migration)

    async def _load(self, migration: str) -> Arrival:
        known = self._known.get(migration)
        if known is None:
            record = await self._world.store.incoming(migration)
            journal = await self._world.store.journal(migration)
            blank = Incoming(migration, "", "", Outcome.UNKNOWN)
            fresh = Arrival(self._world, self._errors, record or blank)
            fresh.take_up(journal)
            known = self._known.setdefault(migration, fresh)
        return known

    @asynccontextmanager
    async def _interruptible(self, arrival: Arrival) -> AsyncIterator[None]:
        """Under the lock, until done or until a Refuse comes."""
        async with arrival.lock:
            try:
                async with asyncio.timeout(None) as scope:
                    arrival.scope = scope
                    try:
                        yield
                    finally:
                        arrival.scope = None
            except TimeoutError:
                raise VmferryError(
                    Reason.MIGRATION_REFUSED, f"{arrival.record.migration} was refused meanwhile.", ""
                ) from None

    async def _check_vm(self, arrival: Arrival, vm: str, platform: str) -> None:
        migration = arrival.record.migration
        for other in self._known.values():
            if other is not arrival and other.record.vm == vm and (other.holds_memory or other.running):
                raise VmferryError(
                    Reason.VM_ALREADY_MIGRATING,
                    f"{vm} is on its way into this host by {other.record.migration}.",
                    "Wait for it, or cancel it on its source.",
                )
        here = self._world.vmms.running(vm)
        own_job = await self._world.store.job(migration)
        within_host = own_job is not None and own_job.vm == vm and own_job.phase not in TERMINAL
        if here is not None and not within_host:
            raise VmferryError(
                Reason.DESTINATION_HAS_VM,
                f"{vm} is on the destination already (VMM pid {here.identity.pid}, {here.identity.state}).",
                "Two VMs of one name cannot be on one host: end or rename the other.",
            )
        waiting = self._world.vmms.incoming(vm)
        if waiting is None:
            raise no_vmm(vm)
        if waiting.identity.platform != platform:
            raise VmferryError(
                Reason.PLATFORM_MISMATCH,
                f"the source runs {vm} as {platform}, the VMM that waits is {waiting.identity.platform}.",
                "Start the waiting VMM with the source's accelerator.",
            )

    async def _append(self, arrival: Arrival, kind: JournalKind, reason: str = "") -> None:
        await arrival.append(kind, reason)
        said = partial(
            log.info, OUTCOME, migration=arrival.record.migration, vm=arrival.record.vm, kind=kind.value, reason=reason
        )
        asyncio.get_running_loop().call_soon(said)  # behind what this task does next: a VM may stand still

    async def _vmm_or_refuse(self, arrival: Arrival) -> None:
        """Behind `running` there is no way back, so what can be known before is."""
        try:
            vmm = await arrival.vmm()
        except VmferryError as error:
            await self._refuse(arrival, f"the waiting VMM is gone: {error.message}")
            raise VmferryError(Reason.MIGRATION_REFUSED, arrival.record.reason, "") from error
        if vmm.identity.state not in HOLDS_STATE:
            await self._refuse(arrival, f"the waiting VMM is {vmm.identity.state}: it has no device state")
            raise VmferryError(Reason.MIGRATION_REFUSED, arrival.record.reason, "")

    async def _refuse(self, arrival: Arrival, reason: str) -> None:
        found = inc.answer(arrival.record.outcome, inc.RefuseAsked(), arrival.record.migration)
        for command in found.commands:
            match command:
                case inc.Record(kind):
                    await self._append(arrival, kind, reason)
                case inc.GiveBack():
                    await self._give_back(arrival)
                case _:
                    raise AssertionError(f"not a step of refuse: {command}")
        await arrival.save()

    async def _give_back(self, arrival: Arrival) -> None:
        """Only this migration's: the VMM may have been prepared for a later one meanwhile."""
        if not arrival.record.vm:
            return
        taken = any(
            other is not arrival and other.record.vm == arrival.record.vm and other.holds_memory
            for other in self._known.values()
        )
        await arrival.give_back(reset_vmm=not taken)

    async def _clean(self, arrival: Arrival) -> None:
        """After a Prepare that failed: nothing stays, and the name is free for another try."""
        await self._quietly(self._give_back(arrival))
        arrival.record = replace(arrival.record, vm="", source_host="")
        await self._quietly(arrival.save())

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except VmferryError as error:
            log.warning(CLEANING_FAILED, error=str(error))

    async def _refuse_cut_off(self, arrival: Arrival) -> None:
        async with arrival.lock:
            if arrival.record.outcome in (Outcome.UNKNOWN, Outcome.REFUSED):
                await self._quietly(self._refuse(arrival, "the destination's daemon was restarted meanwhile"))

    def _follow(self, arrival: Arrival) -> None:
        following = Following(self._world, self._errors, arrival, self._start_vcpus, self._vmm_died)
        self._spawn(f"follow {arrival.record.migration}", following.run())

    async def _start_vcpus(self, arrival: Arrival) -> None:
        """Behind `running` there is no way back: a VMM that is gone now has taken the VM with it."""
        try:
            await arrival.start_vcpus()
        except VmferryError as error:
            if error.reason is Reason.VMM_GONE and arrival.running and not await arrival.vmm_returns():
                await self._lose(arrival, error.message)
            raise

    async def _lose(self, arrival: Arrival, reason: str) -> None:
        await self._append(arrival, JournalKind.LOST, reason)
        arrival.record = replace(arrival.record, lost_reason=reason)
        await arrival.save()
        self._errors.forget(arrival.key)
        await self._quietly(self._world.pagers.remove(arrival.key))

    async def _vmm_died(self, arrival: Arrival, reason: str) -> None:
        """Before it ran: this host refuses. After: the VM is lost, and the source is told."""
        async with arrival.lock:
            if arrival.running:
                await self._lose(arrival, reason)
            elif arrival.holds_memory:
                await self._refuse(arrival, f"the waiting VMM died: {reason}")
