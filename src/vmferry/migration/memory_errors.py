"""Memory errors of this host's VMs: durable first, then told to the pager that serves the VM, if there is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import structlog

from vmferry.errors import VmferryError
from vmferry.migration.changes import Bell
from vmferry.migration.model import LedgerEntry
from vmferry.migration.ports import Pager, Store

log = structlog.get_logger()

RECORDED = "ledger.recorded"
NOT_FORWARDED = "ledger.not_forwarded"
BATCH = 256


class MemoryErrors:
    """Owner of the ledger's writes and of who serves which VM's pages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bell = Bell()
        self._serving: dict[str, tuple[str, Pager]] = {}

    def serve(self, key: str, vm: str, pager: Pager) -> None:
        """From now on errors of `vm` are forwarded to `pager` too."""
        self._serving[key] = (vm, pager)

    def forget(self, key: str) -> None:
        self._serving.pop(key, None)

    async def record(self, vm: str, entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Durable when it returns; the entries that are new or changed. Raises: VmferryError STORE_FAILED."""
        changed = await self._store.record_errors(vm, entries) if entries else ()
        if changed:
            log.info(RECORDED, vm=vm, pages=[hex(entry.gpa) for entry in changed[:16]], count=len(changed))
            self._bell.ring()
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
        return await self._store.ledger(vm)

    async def watch(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """(revision, vm, entry) after a revision, in order, without gaps, then live; "" for all VMs."""
        at = after_revision
        while True:
            seen = self._bell.count
            batch = await self._store.ledger_changes(vm, at, BATCH)
            for change in batch:
                at = change[0]
                yield change
            if not batch:
                await self._bell.after(seen)
