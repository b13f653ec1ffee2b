"""One migration on its destination: its journalled state, and the effect of each command of `state_machine.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import structlog

from vmferry.aio.change_signal import ChangeSignal
from vmferry.aio.concurrency import gather_or_cancel, to_the_end
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.merge import travel
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.destination import state_machine as inc
from vmferry.migration.destination.layout import destination_layout
from vmferry.migration.destination.room import check_room
from vmferry.migration.environment import Environment
from vmferry.migration.side import Side
from vmferry.migration.vmm_lookup import vmm_by_pid
from vmferry.model.facts import HostFacts, MoveFacts, arriving
from vmferry.model.incoming import Wanted
from vmferry.model.journal import JournalEntry, JournalKind
from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Incoming, Outcome, course_with
from vmferry.model.vocabulary import MEANING, phase_of
from vmferry.ports import Pager, Vmm

log = structlog.get_logger()

PREALLOCATED = "incoming.preallocated"
STATE = "incoming.state"


class IncomingMigration:
    """Owner of one incoming migration. `lock` admits one request at a time."""

    def __init__(
        self, environment: Environment, recorder: LedgerRecorder, chronicle: Chronicle, record: Incoming
    ) -> None:
        self.record = record
        self.side = Side(environment, chronicle, record.migration, record.vm, "destination")
        self.lock = asyncio.Lock()
        self.changed = ChangeSignal()
        self.scope: asyncio.Timeout | None = None
        self.key = f"{record.migration}-destination"
        self.pid: int | None = None
        self.life = ""
        """The process of the VMM that waits, or waited, for this migration."""
        self.starting = asyncio.Event()
        self.link_up = False
        """Whether the newest event of the pager reports the link up. False also while no event stream is open."""
        self._environment = environment
        self._recorder = recorder
        self._vmm: Vmm | None = None
        self._pager: Pager | None = None

    @property
    def state(self) -> inc.State:
        """The state that the journal proves."""
        return inc.State.LOST if self.record.lost_reason else inc.State(self.record.outcome.value)

    @property
    def holds_memory(self) -> bool:
        """Whether memory of this host may be allocated for the migration."""
        waits = self.record.outcome in (Outcome.UNKNOWN, Outcome.PREPARED)
        return bool(self.record.vm) and waits

    @property
    def running(self) -> bool:
        return self.state is inc.State.RUNNING

    def recover(self, journal: Sequence[JournalEntry]) -> None:
        """Reads the state from the journal. The stored record is only for people."""
        outcome = inc.outcome_of(inc.state_of([entry.kind for entry in journal]))
        self.record = replace(self.record, outcome=outcome)
        for entry in journal:
            pid = entry.data.get("vmm_pid")
            if entry.kind == JournalKind.PREPARED and isinstance(pid, int):
                self.pid, self.life = pid, str(entry.data.get("vmm_life", ""))
            if job := entry.data.get("job"):
                self.record = replace(self.record, job=str(job))
            if entry.kind == JournalKind.RUNNING and not self.record.started_us:
                self.record = replace(self.record, started_us=entry.at_us)
            if entry.kind == JournalKind.REFUSED:
                self.record = replace(self.record, reason=str(entry.data.get("reason", "")))
            if entry.kind == JournalKind.LOST and not self.record.lost_reason:
                self.record = replace(self.record, lost_reason=str(entry.data.get("reason", "")) or "lost")

    def show(self, record: Incoming) -> None:
        if record != self.record:
            self.record = record
            self._settle()
            self.changed.notify()

    def facts(self) -> MoveFacts:
        """The facts for people, with the events that memory has."""
        now_us = self._environment.clock.now_us()
        return arriving(self._environment.host, self.record, self.side.live, now_us)

    def host_facts(self, heard: int) -> HostFacts:
        """The facts for the source, with this host's events after a number."""
        facts = self.facts()
        return self.side.facts(
            heard,
            phase=facts.phase,
            phase_since_us=facts.phase_since_us,
            reason_code=facts.reason_code,
            reason=facts.reason,
        )

    def _settle(self) -> None:
        """Notes a new phase: in the course, as an event, and in the log."""
        record, phase = self.record, phase_of(self.record)
        self.side.vm = record.vm
        if not record.vm or (record.course and record.course[-1].phase is phase):
            return
        now_us = self._environment.clock.now_us()
        self.record = replace(record, course=course_with(record.course, phase, now_us))
        # Logged after the next step of this task: during the blackout each write to the log counts.
        asyncio.get_running_loop().call_soon(partial(self._say, now_us))

    def _say(self, since_us: int) -> None:
        self.side.look()
        facts = self.facts()
        self.side.note(facts.phase.value, facts.reason)
        say = getattr(log, MEANING[facts.phase].level)
        say(
            STATE,
            migration=facts.migration,
            vm=facts.vm,
            phase=facts.phase.value,
            reason_code=facts.reason_code,
            reason=facts.reason,
            peer_host=facts.source_host,
            phase_since_us=since_us,
        )

    async def until_ended(self) -> None:
        while not self.record.ended:
            await self.changed.wait_after(self.changed.count)

    async def save(self) -> None:
        self._settle()
        await self._environment.store.save_incoming(self.record)
        self.changed.notify()

    async def append(self, kind: JournalKind, reason: str = "") -> None:
        """Appends to the journal. The entry is durable when this returns, and the outcome follows it.

        A cancelled caller does not part them: the entry would be durable, and the next request decided without it.
        """
        await to_the_end(self._append(kind, reason))

    async def _append(self, kind: JournalKind, reason: str) -> None:
        data: dict[str, object] = {"reason": reason} if reason else {}
        if kind is JournalKind.PREPARED:
            data["vmm_pid"], data["vmm_life"] = self.pid, self.life
        if kind in (JournalKind.PREPARED, JournalKind.REFUSED):
            data["job"] = self.record.job
        entry = JournalEntry(self.record.migration, kind.value, self._environment.clock.now_us(), data)
        await self._environment.store.append_journal(entry)
        lost = (reason or "lost") if kind is JournalKind.LOST else self.record.lost_reason
        self.record = replace(
            self.record,
            outcome=inc.outcome_of(inc.state_of([kind.value])),
            reason=reason or self.record.reason,
            lost_reason=lost,
        )
        self._settle()
        self.changed.notify()

    async def save_guard(self, guarded_pages: int) -> None:
        """Saves the guarded pages. The record shows COMPLETED before the journal does."""
        self.record = replace(self.record, guarded_pages=guarded_pages, paused_reason="")
        await self._environment.store.save_incoming(replace(self.record, outcome=Outcome.COMPLETED))

    async def pager(self) -> Pager:
        """Raises: VmferryError PAGER_FAILED if it does not run."""
        found = await self._environment.pagers.find(self.key)
        if found is None:
            raise VmferryError(
                Reason.PAGER_FAILED,
                f"the pager {self.key} does not run.",
                "See pager.log in its runtime directory. Without a pager the VM waits at its next missing page.",
            )
        self._recorder.serve(self.key, self.record.vm, found)
        self._pager = found
        return found

    async def make_memory(self, layout: MemoryLayout, vcpus: int, held: Sequence[PageRange]) -> None:
        """Lets the waiting VMM make its memory and attach it to a new pager.

        `layout` is the source's; the memory takes the page size and backing of the waiting VMM. Memory for the `held`
        pages is allocated where the backing allows it, so a shortage shows before the blackout.
        """
        vmm = self._environment.vmms.incoming(self.record.vm)
        if vmm is None:
            raise no_vmm(self.record.vm)
        layout = destination_layout(layout, vmm.identity.memory)
        check_room(self.record.vm, layout, held, vmm.identity.pid, self._environment.memory_rooms)
        self._vmm, self.pid = vmm, vmm.identity.pid
        self.life = self._environment.vmm_life(vmm.identity.pid)
        pager = self._pager = await self._environment.pagers.start(self.key, self.record.vm, False)
        self._recorder.serve(self.key, self.record.vm, pager)
        features = await pager.expect_destination(layout)
        host, limit_s = self._environment.host, self._environment.timeouts.step_s
        with self.side.waits_for(f"the VMM of {self.record.vm} to make its memory", host, limit_s):
            await vmm.prepare(layout, vcpus, features, pager.memory_socket)
        if held:
            with self.side.waits_for("the destination's pager to allocate memory", host, limit_s):
                made = await pager.preallocate(held)
            log.info(PREALLOCATED, migration=self.record.migration, vm=self.record.vm, bytes=made)

    async def take_ledger(self, ledger: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Makes the ledger durable and returns the memory errors that are new here."""
        new = await self._recorder.take(self.record.vm, travel(ledger))
        return [entry for entry in new if not entry.replaced]

    async def connect_lanes(self, wanted: Wanted) -> None:
        """Connects the lanes and marks all known poison: the source's, and this host's own from an earlier stay."""
        pager = await self._the_pager()
        host, limit_s = self._environment.host, self._environment.timeouts.step_s
        with self.side.waits_for(f"the lanes to the source's pager at {wanted.lane_address}", host, limit_s):
            await pager.connect_lanes(wanted.lane_address, wanted.lane_token)
        known = await self._recorder.ledger(self.record.vm)
        if known:
            await pager.mark_poisoned(known)

    async def mark_new(self, entries: Sequence[LedgerEntry]) -> None:
        if entries:
            await (await self._the_pager()).mark_poisoned(entries)

    async def check_pager(self) -> None:
        """Asks the pager for its link, unless its events report the link up: during the blackout each call counts.

        Raises: VmferryError PAGER_FAILED, LINK_DOWN.
        """
        if self.link_up:
            return
        status = await (await self._the_pager()).status()
        if not (status.link_up or status.all_present):
            why = status.link_reason or "no reason given"
            raise VmferryError(
                Reason.LINK_DOWN,
                f"the pagers of {self.record.vm} have lost their connection: {why}.",
                "Check the network between the hosts for the [pages] ports.",
            )

    async def load_state(self, state: bytes) -> None:
        """Loads the state and reserves the journal: a disk without space shows before the source's commit counts."""
        vmm = await self.vmm()
        await gather_or_cancel(vmm.load_state(state), self._environment.store.reserve(self.key))

    def release_journal(self) -> None:
        self._environment.store.release(self.key)

    async def start_vcpus(self) -> None:
        if self.record.lost_reason:
            raise VmferryError(Reason.VMM_GONE, f"{self.record.vm} was lost here: {self.record.lost_reason}")
        if self.record.started_us and self.starting.is_set():
            return
        await (await self.vmm()).start()
        self.record = replace(self.record, started_us=self._environment.clock.now_us())
        self.starting.set()
        self.changed.notify()

    async def give_back(self, reset_vmm: bool) -> None:
        """Frees everything that this host made for the migration. A dead VMM has nothing to free."""
        self._recorder.forget(self.key)
        if reset_vmm:
            vmm = self._environment.vmms.incoming(self.record.vm)
            if vmm is not None:
                try:
                    await vmm.reset()
                except VmferryError as error:
                    if error.reason is not Reason.VMM_GONE:
                        raise
        self._pager = None
        await self._environment.pagers.remove(self.key)

    @property
    def vmm_ended(self) -> bool:
        """Whether the process of the VMM is known, and has ended."""
        if self.pid is None:
            return False
        if self.life:
            return self._environment.vmm_life(self.pid) != self.life
        return not self._environment.vmm_lives(self.pid)

    async def vmm_returns(self) -> bool:
        """Whether the VMM is connected, or connects again in time."""
        try:
            await self.vmm()
        except VmferryError:
            return False
        return True

    async def vmm(self) -> Vmm:
        """The VMM prepared for this migration, also after it connected again.

        Raises: VmferryError VMM_GONE if it does not connect again in time.
        """
        if self._vmm is None or not any(self._vmm is vmm for vmm in self._environment.vmms.all()):
            self._vmm = await vmm_by_pid(self._environment, self.record.vm, self.pid)
        return self._vmm

    async def _the_pager(self) -> Pager:
        """The known pager, without a check that it lives: the next call to it shows that."""
        return self._pager or await self.pager()


def no_vmm(vm: str) -> VmferryError:
    return VmferryError(
        Reason.DESTINATION_NO_VMM,
        f"no VMM waits for {vm} on the destination.",
        "Start one there with the VM's name, waiting to be a destination (state incoming).",
    )
