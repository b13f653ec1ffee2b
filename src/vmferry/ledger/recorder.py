"""Memory errors of this host's VMs: durable first, then told to the pager that serves the VM, if there is one.

A ledger that was asked for once is kept, so that a switchover reads none from the disk; only what is durable is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from vmferry.aio.change_signal import ChangeSignal
from vmferry.errors import VmferryError
from vmferry.ledger.merge import merge_all
from vmferry.model.memory_error import LedgerEntry
from vmferry.ports import Pager, Store
from vmferry.units import Gpa

log = structlog.get_logger()

RECORDED = "ledger.recorded"
NOT_FORWARDED = "ledger.not_forwarded"
BATCH = 256


class LedgerRecorder:
    """Owner of the ledger's writes and of who serves which VM's pages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = ChangeSignal()
        self.writes = 0
        """That have ended, whether they came to the disk or not: between two of them no ledger has changed."""
        self._serving: dict[str, tuple[str, Pager]] = {}
        self._kept: dict[str, dict[Gpa, LedgerEntry]] = {}
        self._disk = asyncio.Lock()
        """Held over every write and every first reading, so that what is kept misses no write."""

    def serve(self, key: str, vm: str, pager: Pager) -> None:
        """From now on errors of `vm` are forwarded to `pager` too."""
        self._serving[key] = (vm, pager)

    def forget(self, key: str) -> None:
        self._serving.pop(key, None)

    async def record(self, vm: str, entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Durable when it returns; the entries that are new or changed. Raises: VmferryError STORE_FAILED."""
        kept = self._kept.get(vm)
        if not entries or (kept is not None and not merge_all(kept, entries)):
            return ()
        async with self._disk:
            before = self._kept.pop(vm, None)  # a write whose answer is lost may be done: then the disk is read again
            try:
                changed = await self._store.record_errors(vm, entries)
            finally:
                self.writes += 1
            if before is not None:
                self._kept[vm] = before | {entry.gpa: entry for entry in changed}
        if changed:
            log.info(RECORDED, vm=vm, pages=[hex(entry.gpa) for entry in changed[:16]], count=len(changed))
            self._changed.notify()
        return changed

    async def record_and_forward(self, vm: str, entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """The same; then the VM's pagers answer these pages as poison.

        A pager that cannot be told now is told before the VM is handed over: the source tells its pager the whole
        ledger in the switchover.
        """
        changed = await self.record(vm, entries)
        for key, (served, pager) in list(self._serving.items()):
            if served == vm:
                try:
                    await pager.mark_poisoned(entries)
                except VmferryError as error:
                    log.warning(NOT_FORWARDED, vm=vm, pager=key, error=str(error))
        return changed

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """By GPA."""
        if vm not in self._kept:
            async with self._disk:
                self._kept[vm] = {entry.gpa: entry for entry in await self._store.ledger(vm)}
        return [entry for _, entry in sorted(self._kept[vm].items())]

    async def watch(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """(revision, vm, entry) after a revision, in order, without gaps, then live; "" for all VMs."""
        at = after_revision
        while True:
            seen = self._changed.count
            batch = await self._store.ledger_changes(vm, at, BATCH)
            for change in batch:
                at = change[0]
                yield change
            if not batch:
                await self._changed.wait_after(seen)
