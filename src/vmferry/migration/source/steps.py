"""The effects of the commands of `state_machine.py` on the source. No decisions here; each step is safe to repeat."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence

import structlog

from vmferry.aio.backoff import Backoff
from vmferry.aio.concurrency import gather_or_cancel
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.environment import Environment
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.blackout import Blackout
from vmferry.migration.vmm_lookup import vmm_by_pid
from vmferry.model.allocation import allocation_s, layout_bytes
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.journal import JournalEntry
from vmferry.model.memory import Backing
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Job, Outcome
from vmferry.model.vmm import DEVICE_STATE_LIMIT, state_too_large
from vmferry.ports import Pager, Peer, Vmm

log = structlog.get_logger()

STEP_FAILED = "migration.step_failed"
RETRY = "migration.step_retried"


class SourceSteps:
    """The steps of one job, and the values that one step leaves for the next."""

    def __init__(self, environment: Environment, recorder: LedgerRecorder, job: Job) -> None:
        self.migration, self.vm = job.migration, job.vm
        self.key = f"{job.migration}-source"
        self._destination = job.destination
        self.peer: Peer = environment.peers.connect(job.destination, job.nonce)
        self.stopped_us = job.stopped_us
        self.stopped_at_s: float | None = None
        self.destination_host = job.destination_host
        """The destination's own name, once it has answered."""
        self.asked_destination = False
        self.commit_tried = False
        """Whether a commit may be durable."""
        self.aborted = False
        """Whether `aborted` is durable."""
        self.blackout = Blackout(job.vm, environment.host)
        self.push_bytes_per_s = job.push_bytes_per_s
        self.serving = False
        """Whether the source's pager takes a push limit: from ServePages until its removal."""
        self._telling = asyncio.Lock()
        self._environment = environment
        self._recorder = recorder
        self._vmm: Vmm | None = None
        self._pid: int | None = None
        self._anonymous = False
        """Whether memory of the VM ends with the source's VMM."""
        self._pager: Pager | None = None
        self._token = secrets.token_urlsafe(32)
        self._lane = ""
        self._known: tuple[LedgerEntry, ...] = ()
        self._stop_answered = asyncio.Event()
        self._start_error = ""
        """The last error of a Start: the cause, for as long as the destination has not started the VM."""
        self._start_answer = ""
        """The last answer of the destination that it has not started the VM."""

    async def recover(self) -> None:
        """Reads the journal and the host after a restart."""
        self.asked_destination = self.commit_tried = True
        for entry in await self._environment.store.journal(self.migration):
            pid = entry.data.get("vmm_pid")
            if entry.kind == m.JournalKind.BEGIN and isinstance(pid, int):
                self._pid, self.serving = pid, True
                self._anonymous = bool(entry.data.get("anonymous"))
        self._pager = await self._environment.pagers.find(self.key)
        if self._pager is not None:
            self._recorder.serve(self.key, self.vm, self._pager)
        self.serving = self.serving and self._pager is not None

    def limit_s(self, command: m.Command) -> float:
        """Seconds that a step before the commit may take. During Prepare the source lists its held memory, and the
        destination allocates it.
        """
        timeouts = self._environment.timeouts
        if isinstance(command, m.HandOver):
            return timeouts.downtime_s
        if not isinstance(command, m.RequestPrepare) or self._vmm is None:
            return timeouts.step_s
        return timeouts.step_s + 2 * allocation_s(layout_bytes(self._vmm.identity.layout))

    async def prepare(self, command: m.Command) -> None:
        """Performs a step before the blackout."""
        vmm = self._running_vmm()
        match command:
            case m.StartPager():
                self._pager = await self._environment.pagers.start(self.key, self.vm, True)
                self._recorder.serve(self.key, self.vm, self._pager)
            case m.ServePages():
                await self._serve_pages(vmm)
            case m.AttachMemory():
                await vmm.attach_memory(self._the_pager().memory_socket)
            case m.MarkPoison():
                await self._mark_poison()
            case m.SendHello():
                self.destination_host = await self.peer.hello(self.migration)
            case m.RequestPrepare():
                self.asked_destination = True
                what = vmm.identity
                held = tuple(await self._the_pager().list_held(what.layout))
                wanted = Wanted(
                    vm=self.vm,
                    layout=what.layout,
                    vcpus=what.vcpus,
                    platform=what.platform,
                    lane_address=self._lane,
                    lane_token=self._token,
                    ledger=self._known,
                    held=held,
                )
                await self.peer.prepare(self.migration, wanted)
            case _:
                raise AssertionError(f"not a step of preparing: {command}")

    async def _mark_poison(self) -> None:
        """From here on the recorder collects what is new: the blackout carries only that."""
        self._recorder.collect(self.key, self.vm)
        self._known = tuple(await self._recorder.whole_ledger(self.vm))
        bad = _still_bad(self._known)
        if bad:
            await self._the_pager().mark_poisoned(bad)

    async def _serve_pages(self, vmm: Vmm) -> None:
        limit = self.push_bytes_per_s
        self._lane = await self._the_pager().serve_source(vmm.identity.layout, self._token, limit)
        self.serving = True
        if self.push_bytes_per_s != limit:  # It was changed during the call.
            await self.tell_push_limit()

    async def tell_push_limit(self) -> None:
        """Sends one limit at a time, always the newest, so that the pager's last one is the newest."""
        async with self._telling:
            if not self.serving:
                return
            try:
                await self._the_pager().set_push_limit(self.push_bytes_per_s)
            except VmferryError:
                if self.serving:
                    raise  # A pager that was removed during the call has nothing to push.

    async def switch(self, command: m.Command) -> None:
        """Performs a step of the switchover up to the commit."""
        match command:
            case m.ReserveJournal():
                await self._environment.store.reserve(self.key)
            case m.HandOver():
                # The request for the state follows `stop`, and the VMM performs requests in order.
                await gather_or_cancel(self._stop_and_commit(), self._send_ready())
            case m.AppendJournal(kind):
                await self.journal(kind)
            case _:
                raise AssertionError(f"not a step of the switchover: {command}")

    async def _stop_and_commit(self) -> None:
        """The pager learns of bad pages and serves pages before the commit: a recovered commit finds it so."""
        waits_for, here = self.blackout.waits_for, self._environment.host
        try:
            with waits_for(f"the VMM on {here} to stop"):
                await self._running_vmm().stop()
        finally:
            self._stop_answered.set()
        self.stopped_us = self._environment.clock.now_us()
        self.stopped_at_s = self._environment.clock.monotonic_s()
        new = _still_bad(self._recorder.collected(self.key))
        if new:
            with waits_for(f"the pager on {here} to mark memory errors"):
                await self._the_pager().mark_poisoned(new)
        with waits_for(f"the pager on {here} to serve pages"):
            await self._the_pager().freeze()
        with waits_for(f"the store of {here} to keep the commit"):
            await self.journal(m.JournalKind.COMMIT)

    async def _send_ready(self) -> None:
        try:
            with self.blackout.waits_for(f"the VMM on {self._environment.host} to save its device state"):
                state = await self._running_vmm().save_state()
        except VmferryError:
            # An error of `stop` is raised first, and the VM does not return before its reply.
            await self._stop_answered.wait()
            raise
        if len(state) > DEVICE_STATE_LIMIT:
            raise state_too_large(self.vm, len(state))
        with self.blackout.waits_for(f"the destination {self._destination} to get ready"):
            await self.peer.ready(self.migration, state, self._recorder.collected(self.key))

    async def journal(self, kind: m.JournalKind) -> None:
        data: dict[str, object] = {}
        if kind is m.JournalKind.BEGIN:
            identity = self._running_vmm().identity
            self._anonymous = any(region.backing is Backing.ANONYMOUS for region in identity.layout.regions)
            data = {"vmm_pid": identity.pid, "anonymous": self._anonymous}
        if kind is m.JournalKind.SETTLED:
            data = {"outcome": Outcome.REFUSED.value}
        if kind is m.JournalKind.COMMIT:
            self.commit_tried = True
        if kind is m.JournalKind.ABORTED and self.aborted:
            return
        entry = JournalEntry(self.migration, kind.value, self._environment.clock.now_us(), data)
        await self._environment.store.append_journal(entry)
        self.aborted = self.aborted or kind is m.JournalKind.ABORTED

    async def request_start(self) -> m.Event:
        """Sends Start repeatedly, until the destination answers or the deadline passes."""
        clock, timeouts = self._environment.clock, self._environment.timeouts
        deadline = clock.monotonic_s() + timeouts.start_s
        backoff = self._environment.backoff()
        while True:
            try:
                with self.blackout.waits_for(f"the destination {self._destination} to start the VM"):
                    return m.Started(await self.peer.start(self.migration))
            except VmferryError as error:
                self._start_error = self._words_of(error)
                if error.reason in (Reason.MIGRATION_REFUSED, Reason.MIGRATION_UNKNOWN, Reason.VMM_GONE):
                    return await self._outcome_or_unanswered()
                log.warning(RETRY, migration=self.migration, step="start", error=str(error))
                if clock.monotonic_s() >= deadline:
                    return m.StartUnanswered(self._start_error)
            await backoff.pause()

    async def ask_outcome(self, backoff: Backoff) -> m.Event:
        """Asks once for the outcome in the destination's journal, after a pause."""
        await backoff.pause()
        return await self._outcome_or_unanswered()

    async def _outcome_or_unanswered(self) -> m.Event:
        """Only the journal settles the outcome. The answer to a Start may be an old one."""
        try:
            outcome, reason = await self.peer.outcome(self.migration)
            return m.OutcomeReceived(outcome, self._start_error if outcome is Outcome.PREPARED else reason)
        except VmferryError as error:
            words = f"the destination's journal could not be asked: {error.message}"
            return m.StartUnanswered(self._with_answer(words))

    def _words_of(self, error: VmferryError) -> str:
        """An answer of the destination with its remedy: the operator acts there. A silence with its cause."""
        if error.reason is Reason.DESTINATION_UNREACHABLE:
            return self._with_answer(f"Start was not answered: {error.message}")
        self._start_answer = f"the destination {self._destination} answers Start with {error.reason}: {error}"
        return self._start_answer

    def _with_answer(self, silence: str) -> str:
        """A silence hides no answer that came before it."""
        return f"{silence} Before that, {self._start_answer}" if self._start_answer else silence

    @property
    def memory_ended(self) -> bool:
        """Whether memory of the VM ended here, with its VMM: then no network brings the missing pages."""
        return self._anonymous and self._pid is not None and not self._environment.vmm_lives(self._pid)

    def updates(self) -> AsyncIterator[IncomingUpdate]:
        return self.peer.watch(self.migration)

    async def thaw(self) -> None:
        if self._pager is not None:
            await self._pager.thaw()

    async def resume(self) -> None:
        """Resumes the VM. Raises: VmferryError VMM_GONE if the VMM does not connect again in time."""
        vmm = await self._source_vmm()
        try:
            await vmm.resume()
        except VmferryError as error:
            if error.reason is not Reason.VMM_GONE:
                raise
            self._vmm = None
            await (await self._source_vmm()).resume()

    async def abandon(self) -> None:
        """Releases the VMM. A dead VMM has nothing to release."""
        try:
            await (await self._source_vmm()).abandon()
        except VmferryError as error:
            if error.reason is not Reason.VMM_GONE:
                raise

    async def remove_pager(self) -> None:
        self.serving = False
        self._recorder.forget(self.key)
        await self._environment.pagers.remove(self.key)
        self._pager = None

    async def refuse(self, reason: str) -> None:
        await self.peer.refuse(self.migration, reason)

    async def finish(self) -> None:
        await self.peer.finish(self.migration)

    def _running_vmm(self) -> Vmm:
        """The VMM that holds the VM now. Remembered, because a move within the host has two VMMs of the VM."""
        if self._vmm is None:
            self._vmm = self._environment.vmms.running(self.vm)
        if self._vmm is None:
            raise VmferryError(
                Reason.VMM_GONE, f"the VMM of {self.vm} is not connected.", "Start it, or look at its log."
            )
        self._pid = self._vmm.identity.pid
        return self._vmm

    async def _source_vmm(self) -> Vmm:
        connected = self._environment.vmms.all()
        if self._vmm is None or not any(self._vmm is vmm for vmm in connected):
            self._vmm = await vmm_by_pid(self._environment, self.vm, self._pid)
        return self._vmm

    def _the_pager(self) -> Pager:
        if self._pager is None:
            raise VmferryError(Reason.PAGER_FAILED, f"the pager {self.key} was not started.", "See the daemon's log.")
        return self._pager


def _still_bad(ledger: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
    return [entry for entry in ledger if not entry.replaced]
