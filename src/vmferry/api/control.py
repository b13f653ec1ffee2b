"""What the API needs of the daemon. The servicers know nothing else of it; tests have a scripted one.

Each method raises `VmferryError` with the reason that the caller is told.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from vmferry.migration.inventory import Machine
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Job


class MigrationControl(Protocol):
    """Jobs of this host as their source."""

    async def create(self, migration: str, vm: str, destination: str, push_bytes_per_s: int) -> Job:
        """Durable when it returns; the move goes on by itself. MIGRATION_EXISTS, VM_UNKNOWN, VM_ALREADY_MIGRATING, …"""
        ...

    async def job(self, migration: str) -> Job:
        """MIGRATION_UNKNOWN."""
        ...

    async def jobs(self) -> Sequence[Job]: ...
    async def cancel(self, migration: str) -> Job:
        """MIGRATION_UNKNOWN, PAST_NO_RETURN."""
        ...

    async def set_push_limit(self, migration: str, push_bytes_per_s: int) -> Job:
        """Durable, and known to the pager, when it returns. MIGRATION_UNKNOWN, MIGRATION_ENDED, PAGER_FAILED."""
        ...

    def watch(self, migration: str, after_revision: int) -> AsyncIterator[Job]:
        """Every revision after `after_revision`, in order, without gaps, then live; "" for all.
        Between revisions, progress under an unchanged revision.
        Of one migration it ends after the terminal revision. MIGRATION_UNKNOWN."""
        ...


class MachineControl(Protocol):
    """VMs and their memory errors."""

    async def machines(self) -> Sequence[Machine]: ...
    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """VM_UNKNOWN."""
        ...

    def watch_errors(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """(revision, vm, entry) after a revision, in order, then live; "" for all VMs. VM_UNKNOWN."""
        ...

    async def report_error(self, vm: str, gpa: int, lsb: int) -> LedgerEntry:
        """Durable when it returns. VM_UNKNOWN, INVALID_ARGUMENT: no memory there."""
        ...
