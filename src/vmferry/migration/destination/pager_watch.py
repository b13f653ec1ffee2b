"""Follows one pager on the destination, from Prepare until its VM needs it no longer, across restarts of either.

Events are acknowledged once they are durable here, so a restarted daemon gets the others again. One task receives
events, another polls progress. The first to see the last page completes the migration.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import structlog

from vmferry.aio.concurrency import first_error, race
from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.destination.incoming_migration import IncomingMigration
from vmferry.migration.environment import Environment
from vmferry.model.migration import Outcome
from vmferry.model.pace import Pace
from vmferry.model.pager import (
    AllPresent,
    LinkChanged,
    MemoryAttached,
    MemoryDetached,
    MemoryErrorFound,
    PagerEventBody,
    PagerFailedEvent,
    PagesReplaced,
)
from vmferry.ports import Pager

log = structlog.get_logger()

RETRY = "incoming.follow_retried"
COMPLETED = "incoming.completed"
LINK = "incoming.link"
REPLACED = "incoming.poison_replaced"


@dataclass(frozen=True, slots=True)
class Decisions:
    """The calls of the watch into the state machine. The watch calls `start_vcpus` under the migration's lock."""

    start_vcpus: Callable[[IncomingMigration], Awaitable[None]]
    vm_died: Callable[[IncomingMigration, str], Awaitable[None]]
    all_arrived: Callable[[IncomingMigration, int], Awaitable[None]]


class PagerWatch:
    """The watch of one incoming migration's pager."""

    def __init__(
        self,
        environment: Environment,
        recorder: LedgerRecorder,
        incoming: IncomingMigration,
        decisions: Decisions,
    ) -> None:
        self._environment = environment
        self._recorder = recorder
        self._incoming = incoming
        self._decisions = decisions
        self._pushed = False
        self._pace = Pace()
        self._last_page = asyncio.Event()
        self._log = log.bind(migration=incoming.record.migration, vm=incoming.record.vm)

    async def run(self) -> None:
        """Returns once the pager has no more work. It connects again until then."""
        backoff = self._environment.backoff()
        while not self._finished():
            try:
                pager = await self._incoming.pager()
                async with asyncio.TaskGroup() as tasks:
                    name = self._incoming.record.migration
                    events = tasks.create_task(self._receive_events(pager), name=f"events {name}")
                    await self._poll(pager)
                    events.cancel()
            except* VmferryError as group:
                first = group.exceptions[0]
                self._log.warning(RETRY, error=str(first))
                if self._incoming.running:
                    self._pause(f"the destination's pager cannot be reached: {first}")
            except* Exception as group:  # noqa: BLE001 A defect must not end the watch: nobody else follows the pager.
                self._log.exception(RETRY)
                if self._incoming.running:
                    self._pause(f"the destination's daemon met a fault of its own: {first_error(group)!r}; see its log")
            await self._end_with_vmm()
            if not self._finished():
                await backoff.pause()
        await self._remove_pager()

    async def _end_with_vmm(self) -> None:
        """Finds that the VMM has died. A pager that died with it, or hangs, cannot report that."""
        if self._finished() or not self._incoming.vmm_ended:
            return
        try:
            await self._vmm_gone(f"the VMM (pid {self._incoming.pid}) has ended, and its pager does not answer")
        except VmferryError as error:
            self._log.warning(RETRY, error=str(error))

    async def _vmm_gone(self, reason: str) -> None:
        if self._incoming.record.outcome is Outcome.COMPLETED:
            self._incoming.record = replace(self._incoming.record, guarded_pages=0)
            await self._incoming.save()
        else:
            await self._decisions.vm_died(self._incoming, reason)

    async def _remove_pager(self) -> None:
        """Removes a pager that guards nothing after COMPLETED. In the other ends the pager was given back before."""
        if self._incoming.record.outcome is not Outcome.COMPLETED:
            return
        self._recorder.forget(self._incoming.key)
        try:
            pager = await self._environment.pagers.find(self._incoming.key)
            if pager is not None:
                await pager.shutdown(even_if_guest_dies=True)
            await self._environment.pagers.remove(self._incoming.key)
        except VmferryError as error:
            self._log.warning(RETRY, error=str(error))

    def _finished(self) -> bool:
        record = self._incoming.record
        unguarded = record.outcome is Outcome.COMPLETED and not record.guarded_pages
        return unguarded or record.outcome in (Outcome.REFUSED, Outcome.UNKNOWN) or bool(record.lost_reason)

    async def _receive_events(self, pager: Pager) -> None:
        try:
            async for event in pager.events(0):
                await self._handle(pager, event.body)
                await pager.acknowledge(event.number)
        finally:
            self._incoming.link_up = False
        # A stream that ends shows that the pager has ended; `_poll` finds that out.

    async def _handle(self, pager: Pager, body: PagerEventBody) -> None:
        # More events may follow this one, and one of them may report the link down.
        self._incoming.link_up = isinstance(body, LinkChanged) and body.up
        match body:
            case MemoryErrorFound():
                entry = replace(body.error, guest_visible=body.error.guest_visible or body.reported)
                await self._recorder.record(self._incoming.record.vm, [entry])
                self._incoming.changed.notify()
            case PagesReplaced(pages):
                await self._replaced(pager, pages)
            case LinkChanged(up, reason):
                self._log.info(LINK, up=up, reason=reason)
                self._pause("" if up else reason or "the link between the pagers is down")
            case MemoryDetached(reason):
                await self._detached(pager, reason)
            case PagerFailedEvent(reason):
                self._pause(f"the destination's pager cannot go on: {reason}")
            case AllPresent():
                self._last_page.set()
                self._incoming.changed.notify()
            case MemoryAttached():
                self._incoming.changed.notify()
            case _:
                assert_never(body)

    async def _replaced(self, pager: Pager, pages: Sequence[tuple[int, int]]) -> None:
        """The VMM has replaced poisoned pages. Without any others the pager guards nothing more."""
        await self._recorder.record_replaced(self._incoming.record.vm, pages)
        self._log.info(REPLACED, count=len(pages))
        if self._incoming.record.outcome is Outcome.COMPLETED:
            guarded = await pager.complete()
            if guarded or await self._tell_complete(keep_uffd=False):
                await self._incoming.save_guard(guarded)
        self._incoming.changed.notify()

    async def _detached(self, pager: Pager, reason: str) -> None:
        """The VM died, unless all pages are present. A VMM may then close this connection, and the control connection
        tells.
        """
        status = await pager.status()
        if status.memory_attached:
            return
        if self._incoming.record.outcome is Outcome.COMPLETED or not status.all_present:
            await self._vmm_gone(reason)

    async def _poll(self, pager: Pager) -> None:
        """Polls progress, starts the push once the VM runs, and completes once the last page is present."""
        while not self._finished():
            seen = self._incoming.changed.count
            if self._incoming.running:
                await self._push(pager)
                status = await pager.status()
                up = status.link_up or status.all_present
                paused = "" if up else status.link_reason or self._incoming.record.paused_reason
                clock = self._environment.clock
                progress = self._pace.observe(status.progress, clock.monotonic_s(), clock.now_us())
                if paused:
                    self._incoming.side.look()
                self._incoming.show(replace(self._incoming.record, progress=progress, paused_reason=paused))
                if status.all_present:
                    await self._complete(pager)
            else:
                await self._incoming.changed.wait_after(seen)
                continue
            await race(self._environment.clock.sleep(self._environment.timeouts.progress_s), self._last_page.wait())
            self._last_page.clear()

    async def _push(self, pager: Pager) -> None:
        """Starts the push. After a restart between `running` and the first vCPU it starts the VM first."""
        if self._pushed:
            return
        async with self._incoming.lock:
            await self._decisions.start_vcpus(self._incoming)
        await pager.start_push()
        self._pushed = True
        await self._incoming.save()

    async def _complete(self, pager: Pager) -> None:
        """Ends the pager's work. If pages are poisoned, pager and uffd stay for the life of the VM."""
        guarded = await pager.complete()
        if not await self._tell_complete(guarded > 0):
            return
        await self._decisions.all_arrived(self._incoming, guarded)
        if self._incoming.record.outcome is Outcome.COMPLETED:
            self._log.info(COMPLETED, guarded_pages=guarded)

    async def _tell_complete(self, keep_uffd: bool) -> bool:
        """Tells the VMM that its memory is complete. It waits for a VMM whose connection broke. False: the VMM died."""
        backoff = self._environment.backoff()
        while True:
            try:
                vmm = await self._incoming.vmm()
            except VmferryError as error:
                await self._decisions.vm_died(self._incoming, error.message)
                return False
            try:
                await vmm.migration_complete(keep_uffd)
            except VmferryError as error:
                if error.reason is not Reason.VMM_GONE:
                    raise
            else:
                return True
            # A session that has ended is found until its reader has left: the reader needs this loop to pause.
            await backoff.pause()

    def _pause(self, reason: str) -> None:
        self._incoming.side.look()
        self._incoming.show(replace(self._incoming.record, paused_reason=reason))
