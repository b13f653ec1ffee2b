"""The destination's answers to the source's daemon: `peer/` calls these methods. Idempotent by migration.

`state_machine.py` decides about a request from the journal. The request is then done under the migration's lock.
A Refuse does not wait for a Prepare or Ready that hangs: it ends that call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import assert_never

import structlog

from vmferry.aio.concurrency import race, to_the_end
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.destination import state_machine as inc
from vmferry.migration.destination.incoming_migration import IncomingMigration, no_vmm
from vmferry.migration.destination.layout import check_layout
from vmferry.migration.destination.pager_watch import Decisions, PagerWatch
from vmferry.migration.environment import Environment, Spawn
from vmferry.model.facts import HostFacts, MoveFacts
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.journal import JournalEntry, JournalKind
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import TERMINAL, Incoming, Outcome

log = structlog.get_logger()

OUTCOME = "incoming.outcome"
CLEANING_FAILED = "incoming.cleaning_failed"

UPDATE_S = 0.1
"""At most 10 updates a second go to the source (peer.proto). The last update goes at once."""
CHANGES_AT_ONCE = 1000
"""The most memory errors in one update."""
NEW_VMM = "Start a waiting VMM on the destination, then begin a new migration under another name."
HOLDS_STATE = frozenset({"loaded", "running"})
"""The states of a VMM that holds the device state."""


class IncomingService:
    """Owner of this host's incoming migrations."""

    def __init__(self, environment: Environment, recorder: LedgerRecorder, chronicle: Chronicle, spawn: Spawn) -> None:
        self._environment = environment
        self._chronicle = chronicle
        self._recorder = recorder
        self._spawn = spawn
        self._known: dict[str, IncomingMigration] = {}
        self._open: dict[str, IncomingMigration] = {}
        """Those that had not ended at the last look."""
        self._ended: dict[str, IncomingMigration] = {}
        """Those that had, in the order of their ends."""

    async def recover(self) -> None:
        """After a restart: continues from the journal.

        A Prepare that the restart cut off is refused, because its caller is gone. A refusal or a loss that its record
        does not show yet is finished.
        """
        journals = await self._environment.store.incoming_journals()
        records = await self._environment.store.incomings()
        for record in sorted(records, key=lambda one: one.course[-1].at_us if one.course else one.started_us):
            incoming = self._known[record.migration] = self._made(record, journals.get(record.migration, ()))
            self._open[record.migration] = incoming
            match incoming.state:
                case inc.State.UNKNOWN:
                    self._spawn(f"refuse {record.migration}", self._refuse_cut_off(incoming))
                case inc.State.REFUSED:
                    if record.outcome is not Outcome.REFUSED:
                        self._spawn(f"refuse {record.migration}", self._refuse_cut_off(incoming))
                case inc.State.LOST:
                    if not record.lost_reason:
                        self._spawn(f"lose {record.migration}", self._lose(incoming, incoming.record.lost_reason))
                case inc.State.PREPARED | inc.State.RUNNING | inc.State.COMPLETED:
                    self._follow(incoming)
                case _:
                    assert_never(incoming.state)

    def all(self) -> list[Incoming]:
        return [incoming.record for incoming in self._known.values() if incoming.record.vm]

    def active(self) -> list[Incoming]:
        """The migrations that have not ended here."""
        self._sort()
        return [incoming.record for incoming in self._open.values() if incoming.record.vm]

    def ended(self, limit: int) -> list[MoveFacts]:
        """The facts of those that ended last, the newest first."""
        self._sort()
        return [incoming.facts() for incoming in islice(reversed(self._ended.values()), limit)]

    @property
    def ended_count(self) -> int:
        return len(self._ended)

    def _sort(self) -> None:
        for name, incoming in tuple(self._open.items()):
            if incoming.record.ended:
                del self._open[name]
                if incoming.record.vm:
                    self._ended[name] = incoming

    def facts(self, migration: str) -> MoveFacts | None:
        """The facts of a migration into this host, with the events that memory has."""
        known = self._known.get(migration)
        return known.facts() if known is not None and known.record.vm else None

    def forget(self, migrations: Collection[str]) -> None:
        """Lets go of ended migrations that the store has deleted."""
        for migration in migrations:
            for known in (self._known, self._open, self._ended):
                known.pop(migration, None)

    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]:
        """Takes in the source's facts, and returns this host's. It waits for nothing."""
        incoming = await self._load(migration)
        incoming.side.hear(facts)
        incoming.side.look()
        return incoming.host_facts(heard), incoming.side.heard_events()

    def brought(self, vm: str, life: str) -> bool:
        """Whether the VM moved into this process."""
        return any(
            one.life == life and one.record.vm == vm and one.record.outcome in (Outcome.RUNNING, Outcome.COMPLETED)
            for one in self._known.values()
        )

    async def admit(self, migration: str, job: str, source: str | None = None) -> None:
        """Binds the migration's id to the first job that names it: ids are unique on one source only.

        `source` is the host that the caller's certificate names. None: callers have no certificates.

        Raises: VmferryError MIGRATION_EXISTS, PERMISSION_DENIED.
        """
        incoming = await self._load(migration)
        if source is not None and incoming.record.source_host not in ("", source):
            raise VmferryError(
                Reason.PERMISSION_DENIED,
                f"{migration} comes from another host than {source}.",
                "Call from its source, with that host's certificate.",
            )
        if not incoming.record.job:
            incoming.record = replace(incoming.record, job=job, source_host=source or incoming.record.source_host)
        if incoming.record.job != job:
            known = incoming.record
            whose = f" It is {known.vm} from {known.source_host}." if known.vm else ""
            raise VmferryError(
                Reason.MIGRATION_EXISTS,
                f"the destination {self._environment.host} knows {migration} as another job.{whose}",
                "Begin a new migration, under another name.",
            )

    async def hello(self, migration: str) -> str:
        """Returns this host's name."""
        del migration
        return self._environment.host

    async def prepare(self, migration: str, wanted: Wanted, source_host: str = "") -> None:
        """Prepares this host for the VM.

        Raises: VmferryError DESTINATION_NO_VMM, DESTINATION_NO_MEMORY, DESTINATION_HAS_VM, PLATFORM_MISMATCH, …
        """
        incoming = await self._load(migration)
        async with self._interruptible(incoming):
            found = inc.answer(incoming.state, inc.PrepareRequested(), migration)
            if not found.commands:
                _check_same_request(incoming, wanted)
                return
            check_layout(wanted.layout)
            await self._check_vm(incoming, wanted.vm, wanted.platform)
            try:
                asked = wanted.digest()
                incoming.record = replace(incoming.record, vm=wanted.vm, source_host=source_host, prepared_for=asked)
                await incoming.save()
                for command in found.commands:
                    await self._prepare_step(incoming, command, wanted)
                await incoming.save()
            except BaseException:
                await to_the_end(self._clean(incoming))
                raise
        self._follow(incoming)

    async def _prepare_step(self, incoming: IncomingMigration, command: inc.Command, wanted: Wanted) -> None:
        match command:
            case inc.MakeMemory():
                await incoming.make_memory(wanted.layout, wanted.vcpus, wanted.held)
            case inc.TakeLedger():
                await incoming.take_ledger(wanted.ledger)
            case inc.ConnectLanes():
                await incoming.connect_lanes(wanted)
            case inc.AppendJournal(kind):
                await self._append(incoming, kind)
            case _:
                raise AssertionError(f"nothing performs {command} for a Prepare")

    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None:
        """Makes known poison durable, marks it, and loads the device state."""
        incoming = await self._load(migration)
        self._environment.processors.keep_awake(incoming.key)
        async with self._interruptible(incoming):
            found = inc.answer(incoming.state, inc.ReadyRequested(), migration)
            for command in found.commands:
                await self._ready_step(incoming, command, device_state, ledger)

    async def _ready_step(
        self, incoming: IncomingMigration, command: inc.Command, device_state: bytes, ledger: Sequence[LedgerEntry]
    ) -> None:
        match command:
            case inc.TakeLedger():
                await incoming.mark_new(await incoming.take_ledger(ledger))
            case inc.CheckPager():
                await incoming.check_pager()
            case inc.LoadState():
                await incoming.load_state(device_state)
            case _:
                raise AssertionError(f"nothing performs {command} for a Ready")

    async def start(self, migration: str) -> int:
        """Starts the VM. Returns the time at which its vCPUs started, Unix microseconds."""
        incoming = await self._load(migration)
        async with incoming.lock:
            found = inc.answer(incoming.state, inc.StartRequested(), migration)
            for command in found.commands:
                match command:
                    case inc.CheckVmm():
                        await self._vmm_or_refuse(incoming)
                    case inc.AppendJournal(kind):
                        await self._append(incoming, kind)
                    case inc.StartVcpus():
                        await self._start_vcpus(incoming)
                    case _:
                        raise AssertionError(f"nothing performs {command} for a Start")
            self._environment.processors.let_sleep(incoming.key)
            incoming.release_journal()
            return incoming.record.started_us

    async def refuse(self, migration: str, reason: str) -> None:
        """Refuses the migration for good. Raises: VmferryError MIGRATION_RUNNING."""
        incoming = await self._load(migration)
        if incoming.scope is not None:
            incoming.scope.reschedule(asyncio.get_running_loop().time())
        await to_the_end(self._refuse_locked(incoming, reason))

    async def _refuse_locked(self, incoming: IncomingMigration, reason: str) -> None:
        """A cancelled caller does not cut it off: a refusal that is durable gives everything back."""
        async with incoming.lock:
            await self._refuse(incoming, reason)

    async def outcome(self, migration: str) -> tuple[Outcome, str]:
        """The outcome in the journal. The lock keeps the answer out of the gap between a decision and its entry."""
        incoming = await self._load(migration)
        async with incoming.lock:
            return incoming.record.outcome, incoming.record.lost_reason or incoming.record.reason

    async def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]:
        """Yields progress, and every memory error once per stream. It ends with COMPLETED, REFUSED or the loss of the
        VM.
        """
        incoming = await self._load(migration)
        if not incoming.record.vm:
            raise VmferryError(
                Reason.MIGRATION_UNKNOWN,
                f"{migration} is unknown on this host.",
                "Check that the migration names this host as its destination.",
            )
        revision = 0
        read: int | None = None
        while True:
            seen = incoming.changed.count
            record = incoming.record
            changes: Sequence[tuple[int, str, LedgerEntry]] = ()
            if record.ended or read != self._recorder.writes:  # the last update holds every write
                read = self._recorder.writes
                changes = await self._environment.store.ledger_changes(record.vm, revision, CHANGES_AT_ONCE)
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
                await incoming.changed.wait_after(seen)
            if not record.ended:
                await race(self._environment.clock.sleep(UPDATE_S), incoming.until_ended())

    async def finish(self, migration: str) -> None:
        """Accepts that the source has ended. This host keeps its journal, its ledger and its poison guard."""
        await self._load(migration)

    async def _load(self, migration: str) -> IncomingMigration:
        known = self._known.get(migration)
        if known is None:
            record = await self._environment.store.incoming(migration)
            journal = await self._environment.store.journal(migration)
            fresh = self._made(record or Incoming(migration, "", "", Outcome.UNKNOWN), journal)
            known = self._known.setdefault(migration, fresh)
            self._open.setdefault(migration, known)
        return known

    def _made(self, record: Incoming, journal: Sequence[JournalEntry]) -> IncomingMigration:
        made = IncomingMigration(self._environment, self._recorder, self._chronicle, record)
        made.recover(journal)
        return made

    @asynccontextmanager
    async def _interruptible(self, incoming: IncomingMigration) -> AsyncIterator[None]:
        """Holds the lock until the request is done, or until a Refuse ends it."""
        async with incoming.lock:
            try:
                async with asyncio.timeout(None) as scope:
                    incoming.scope = scope
                    try:
                        yield
                    finally:
                        incoming.scope = None
            except TimeoutError:
                raise VmferryError(
                    Reason.MIGRATION_REFUSED,
                    f"{incoming.record.migration} was refused while this call ran.",
                    "Begin a new migration, under another name.",
                ) from None

    async def _check_vm(self, incoming: IncomingMigration, vm: str, platform: str) -> None:
        migration = incoming.record.migration
        for other in self._open.values():
            if other is not incoming and other.record.vm == vm and (other.holds_memory or other.running):
                raise VmferryError(
                    Reason.VM_ALREADY_MIGRATING,
                    f"{vm} is already moving to this host, by {other.record.migration}.",
                    "Wait for it, or cancel it on its source.",
                )
        here = self._environment.vmms.running(vm)
        own_job = await self._environment.store.job(migration)
        within_host = own_job is not None and own_job.vm == vm and own_job.phase not in TERMINAL
        if here is not None and not within_host:
            raise VmferryError(
                Reason.DESTINATION_HAS_VM,
                f"{vm} is on the destination already (VMM pid {here.identity.pid}, {here.identity.state}).",
                "Two VMs of one name cannot be on one host: end or rename the other.",
            )
        if self._environment.vmms.incoming(vm) is None:
            await self._environment.starter.start(vm, platform)
        waiting = self._environment.vmms.incoming(vm)
        if waiting is None:
            raise no_vmm(vm)
        if waiting.identity.platform != platform:
            raise VmferryError(
                Reason.PLATFORM_MISMATCH,
                f"the source runs {vm} as {platform}, the VMM that waits is {waiting.identity.platform}.",
                "Start the waiting VMM with the source's accelerator.",
            )

    async def _append(self, incoming: IncomingMigration, kind: JournalKind, reason: str = "") -> None:
        await incoming.append(kind, reason)
        said = partial(
            log.info,
            OUTCOME,
            migration=incoming.record.migration,
            vm=incoming.record.vm,
            kind=kind.value,
            reason=reason,
        )
        # Logged after the next step of this task: during the blackout each write to the log counts.
        asyncio.get_running_loop().call_soon(said)

    async def _vmm_or_refuse(self, incoming: IncomingMigration) -> None:
        """Checks the VMM before `running` is journalled, because nothing is refused after it."""
        try:
            vmm = await incoming.vmm()
        except VmferryError as error:
            await self._refuse(incoming, f"the waiting VMM is gone: {error.message}")
            raise VmferryError(Reason.MIGRATION_REFUSED, f"{incoming.record.reason.rstrip('.')}.", NEW_VMM) from error
        if vmm.identity.state not in HOLDS_STATE:
            await self._refuse(incoming, f"the waiting VMM is {vmm.identity.state}: it has no device state")
            raise VmferryError(Reason.MIGRATION_REFUSED, f"{incoming.record.reason.rstrip('.')}.", NEW_VMM)

    async def _refuse(self, incoming: IncomingMigration, reason: str) -> None:
        found = inc.answer(incoming.state, inc.RefuseRequested(), incoming.record.migration)
        await self._end(incoming, found, reason)

    async def _end(self, incoming: IncomingMigration, found: inc.Answer, reason: str) -> None:
        """Performs the way to REFUSED or LOST."""
        for command in found.commands:
            match command:
                case inc.AppendJournal(kind):
                    await self._append(incoming, kind, reason)
                case inc.GiveBack():
                    await self._give_back(incoming)
                case inc.RemovePager():
                    self._recorder.forget(incoming.key)
                    await self._quietly(self._environment.pagers.remove(incoming.key))
                case _:
                    raise AssertionError(f"nothing performs {command} at the end of an incoming migration")
        incoming.release_journal()
        await incoming.save()

    async def _give_back(self, incoming: IncomingMigration) -> None:
        """Frees the memory of this migration. The VMM may already be prepared for a later one, and then it is not
        reset.
        """
        if not incoming.record.vm:
            return
        taken = any(
            other is not incoming and other.record.vm == incoming.record.vm and other.holds_memory
            for other in self._known.values()
        )
        await incoming.give_back(reset_vmm=not taken)

    async def _clean(self, incoming: IncomingMigration) -> None:
        """After a failed Prepare: frees everything, so that the name is free for another attempt."""
        await self._quietly(self._give_back(incoming))
        incoming.record = replace(incoming.record, vm="", source_host="")
        await self._quietly(incoming.save())

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except VmferryError as error:
            log.warning(CLEANING_FAILED, error=str(error))

    async def _refuse_cut_off(self, incoming: IncomingMigration) -> None:
        async with incoming.lock:
            if incoming.record.outcome in (Outcome.UNKNOWN, Outcome.REFUSED):
                await self._quietly(
                    self._refuse(incoming, "the destination's daemon was restarted during the preparation")
                )

    def _follow(self, incoming: IncomingMigration) -> None:
        decisions = Decisions(self._start_vcpus, self._vm_died, self._all_arrived)
        watch = PagerWatch(self._environment, self._recorder, incoming, decisions)
        self._spawn(f"follow {incoming.record.migration}", watch.run())

    async def _start_vcpus(self, incoming: IncomingMigration) -> None:
        """Starts the vCPUs. If the VMM has died after `running` was journalled, the VM is lost with it."""
        try:
            await incoming.start_vcpus()
        except VmferryError as error:
            if error.reason is Reason.VMM_GONE and incoming.running and not await incoming.vmm_returns():
                await self._vm_gone(incoming, error.message)
            raise

    async def _vm_died(self, incoming: IncomingMigration, reason: str) -> None:
        """A cancelled caller does not cut it off: the watch ends as soon as the VM is lost, and the pager must go."""
        await to_the_end(self._lose(incoming, reason))

    async def _lose(self, incoming: IncomingMigration, reason: str) -> None:
        async with incoming.lock:
            await self._vm_gone(incoming, reason)

    async def _vm_gone(self, incoming: IncomingMigration, reason: str) -> None:
        """Refuses a VM that has not run here. Declares one that has run lost, and the source is told."""
        found = inc.answer(incoming.state, inc.VmDied(), incoming.record.migration)
        if found.commands:
            why = reason if found.state is inc.State.LOST else f"the waiting VMM died: {reason}"
            await self._end(incoming, found, why)

    async def _all_arrived(self, incoming: IncomingMigration, guarded_pages: int) -> None:
        async with incoming.lock:
            found = inc.answer(incoming.state, inc.AllArrived(), incoming.record.migration)
            for command in found.commands:
                match command:
                    case inc.SaveGuard():
                        await incoming.save_guard(guarded_pages)
                    case inc.AppendJournal(kind):
                        await self._append(incoming, kind)
                    case _:
                        raise AssertionError(f"nothing performs {command} once all pages have arrived")


def _check_same_request(incoming: IncomingMigration, wanted: Wanted) -> None:
    """A repeated Prepare is answered as done only if it asks for the same."""
    record = incoming.record
    if record.prepared_for == wanted.digest():
        return
    what = f"not {wanted.vm}" if record.vm != wanted.vm else "and was prepared for another layout, platform or lane"
    raise VmferryError(
        Reason.MIGRATION_EXISTS,
        f"{record.migration} moves {record.vm} to this host, {what}.",
        "Begin a new migration, under another name.",
    )
