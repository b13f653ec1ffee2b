"""Records the memory errors of this host's VMs: durable first, then forwarded to the pagers that serve the VM.

A ledger that was read once is cached, so that a switchover reads nothing from disk. The cache holds only durable
entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import structlog

from vmferry.aio.change_signal import ChangeSignal
from vmferry.errors import VmferryError
from vmferry.ledger.merge import Block, merge_all, replaced, sighted
from vmferry.model.memory_error import LedgerEntry
from vmferry.ports import Pager, Store
from vmferry.units import Gpa

log = structlog.get_logger()

RECORDED = "ledger.recorded"
ENDED = "ledger.ended"
NOT_FORWARDED = "ledger.not_forwarded"
BATCH = 256


class LedgerRecorder:
    """Owner of the ledger's writes, and of the assignment of pagers to VMs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = ChangeSignal()
        self.writes = 0
        """Counts ended writes, also those that failed. Between two equal counts no ledger has changed."""
        self._serving: dict[str, tuple[str, Pager]] = {}
        self._collected: dict[str, tuple[str, dict[Gpa, LedgerEntry]]] = {}
        self._kept: dict[str, dict[Gpa, LedgerEntry]] = {}
        self._disk = asyncio.Lock()
        """Held during every write and every first read, so that the cache misses no write."""

    def serve(self, key: str, vm: str, pager: Pager) -> None:
        """Forwards the errors of `vm` to `pager` too, from now on."""
        self._serving[key] = (vm, pager)

    def forget(self, key: str) -> None:
        self._serving.pop(key, None)
        self._collected.pop(key, None)

    def collect(self, key: str, vm: str) -> None:
        """Collects the changes to the ledger of `vm` from now on, until `forget`."""
        self._collected[key] = (vm, {})

    def collected(self, key: str) -> Sequence[LedgerEntry]:
        """The entries that are new or changed since `collect`."""
        _, changes = self._collected.get(key, ("", {}))
        return tuple(changes.values())

    async def record(self, vm: str, found: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Makes errors that were found on this host durable, and returns those that are new or changed.

        Raises: VmferryError STORE_FAILED.
        """
        return await self.take(vm, sighted(await self._entries(vm), found)) if found else ()

    async def record_replaced(self, vm: str, pages: Sequence[Block]) -> None:
        """The VMM has put fresh memory in the place of these pages: their errors end. Raises: VmferryError
        STORE_FAILED.
        """
        await self.take(vm, replaced(await self._entries(vm), pages))

    async def take(self, vm: str, entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Makes entries of any host's ledger durable, and returns those that are new or changed. Raises: VmferryError
        STORE_FAILED.
        """
        kept = self._kept.get(vm)
        if not entries or (kept is not None and not merge_all(kept, entries)):
            return ()
        async with self._disk:
            before = self._kept.pop(vm, None)  # an error may hide a write that was done: read again
            changed = entries
            try:
                changed = await self._store.record_errors(vm, entries)
            finally:
                self.writes += 1
                self._collect(vm, changed)
            if before is not None:
                before.update((entry.gpa, entry) for entry in changed)
                self._kept[vm] = before
        if changed:
            log.info(RECORDED, vm=vm, pages=[hex(entry.gpa) for entry in changed[:16]], count=len(changed))
            self._changed.notify()
        return changed

    async def record_and_forward(self, vm: str, entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        """Records the entries; then the VM's pagers answer these pages as poison.

        A pager that cannot be reached now learns of them later: the source tells its pager the whole ledger in the
        switchover.
        """
        changed = await self.record(vm, entries)
        for key, (served, pager) in list(self._serving.items()):
            if served == vm:
                try:
                    await pager.mark_poisoned(entries)
                except VmferryError as error:
                    log.warning(NOT_FORWARDED, vm=vm, pager=key, error=str(error))
        return changed

    async def forget_replaced(self, vm: str) -> None:
        """The guest was reset: the pagers of the VM look which bad pages its VMM has replaced. Raises: VmferryError
        PAGER_FAILED.
        """
        for served, pager in list(self._serving.values()):
            if served == vm:
                await pager.forget_replaced()

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """The memory errors of a VM, by GPA."""
        return [entry for entry in await self.whole_ledger(vm) if not entry.replaced]

    async def whole_ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """The same with the errors that have ended, as another host needs it."""
        return [entry for _, entry in sorted((await self._entries(vm)).items())]

    async def begin_life(self, vm: str, life: str, moved_in: bool) -> None:
        """The VM is the process `life`. Another process than before is other memory, unless the VM moved into it: the
        ledger then begins empty. Raises: VmferryError STORE_FAILED.
        """
        async with self._disk:
            if await self._store.life(vm) == life:
                return
            ended = 0 if moved_in else len(await self._store.ledger(vm))
            self._kept.pop(vm, None)
            try:
                await self._store.begin_life(vm, life, moved_in)
            finally:
                self.writes += 1
        if ended:
            log.info(ENDED, vm=vm, life=life, count=ended)

    async def count(self, vm: str) -> int:
        """The number of memory errors of a VM."""
        return len(await self.ledger(vm))

    async def watch(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """Yields (revision, vm, entry) after a revision, in order and without gaps, then live. "" watches all VMs."""
        at = after_revision
        while True:
            seen = self._changed.count
            batch = await self._store.ledger_changes(vm, at, BATCH)
            for change in batch:
                at = change[0]
                yield change
            if not batch:
                await self._changed.wait_after(seen)

    async def _entries(self, vm: str) -> Mapping[Gpa, LedgerEntry]:
        kept = self._kept.get(vm)
        if kept is None:
            async with self._disk:
                kept = self._kept.get(vm)
                if kept is None:
                    kept = self._kept[vm] = {entry.gpa: entry for entry in await self._store.ledger(vm)}
        return kept

    def _collect(self, vm: str, entries: Sequence[LedgerEntry]) -> None:
        for followed, changes in self._collected.values():
            if followed == vm:
                changes.update((entry.gpa, entry) for entry in entries)
