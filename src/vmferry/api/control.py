"""The part of the daemon that the API needs. The servicers know nothing else of it; tests have a scripted one.

Each method raises `VmferryError` with the reason for the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from vmferry.migration.inventory import Machine
from vmferry.model.facts import Direction, MoveFacts
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Job
from vmferry.model.problems import Problem
from vmferry.ports import Vmm
from vmferry.vmm.qemu.vmm import QemuCheck


class MigrationControl(Protocol):
    """The jobs that have this host as their source."""

    async def create(self, migration: str, vm: str, destination: str, push_bytes_per_s: int, requested_by: str) -> Job:
        """Makes the job durable; the move then runs by itself. MIGRATION_EXISTS, VM_UNKNOWN, VM_ALREADY_MIGRATING, …"""
        ...

    async def validate(self, vm: str, destination: str) -> str:
        """Checks as `create` does, and returns the name of the destination, which answers. Changes nothing."""
        ...

    async def job(self, migration: str) -> Job:
        """Raises: VmferryError MIGRATION_UNKNOWN."""
        ...

    async def jobs(self) -> Sequence[Job]: ...
    async def cancel(self, migration: str) -> Job:
        """Raises: VmferryError MIGRATION_UNKNOWN, PAST_NO_RETURN."""
        ...

    async def set_push_limit(self, migration: str, push_bytes_per_s: int) -> Job:
        """The limit is durable when this returns; a pager that does not answer gets it later. MIGRATION_UNKNOWN,
        MIGRATION_ENDED.
        """
        ...

    def watch(self, migration: str, after_revision: int) -> AsyncIterator[Job]:
        """Yields every revision after `after_revision`, in order and without gaps, then live. "" watches all.

        Between revisions it yields progress under an unchanged revision. A watch of one migration ends after the
        terminal revision. Raises: VmferryError MIGRATION_UNKNOWN.
        """
        ...

    def watch_from_now(self) -> AsyncIterator[Job]:
        """Yields each job under way as it is, then every later revision of all."""
        ...


class MoveControl(Protocol):
    """The facts of all migrations of this host, in both directions."""

    def of_job(self, job: Job) -> MoveFacts: ...
    async def facts(self, migration: str, direction: Direction | None) -> MoveFacts:
        """With the events of both hosts. None: the one out of this host, else the one into it. MIGRATION_UNKNOWN."""
        ...

    def incoming(self) -> Sequence[MoveFacts]: ...
    def watch_incoming(self) -> AsyncIterator[MoveFacts]:
        """Yields each migration into this host as it is, then every change of one."""
        ...

    async def delete(self, migration: str, direction: Direction | None) -> None:
        """Raises: VmferryError MIGRATION_UNKNOWN, MIGRATION_RUNNING."""
        ...


class ProblemControl(Protocol):
    """All that is wrong on this host now."""

    async def problems(self) -> Sequence[Problem]:
        """The problems, the worst first."""
        ...


class MachineControl(Protocol):
    """VMs and their memory errors."""

    async def machines(self) -> Sequence[Machine]: ...
    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        """Raises: VmferryError VM_UNKNOWN."""
        ...

    def watch_errors(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        """Yields (revision, vm, entry) after a revision, in order, then live. "" watches all VMs. VM_UNKNOWN."""
        ...

    async def report_error(self, vm: str, gpa: int, lsb: int) -> LedgerEntry:
        """The error is durable when this returns. VM_UNKNOWN, INVALID_ARGUMENT: no memory there."""
        ...


class QemuControl(Protocol):
    """Adopted QEMUs."""

    async def adopt(self, path: Path, vm: str) -> Vmm:
        """Adopts the QEMU of a monitor, durably. `vm`: "" is QEMU's own name. INVALID_ARGUMENT, VMM_GONE, …"""
        ...

    async def check(self, vm: str) -> QemuCheck:
        """Raises: VmferryError VM_UNKNOWN."""
        ...
