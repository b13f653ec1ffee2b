"""A control that a test scripts: the API's other side without a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from vmferry.errors import Reason, VmferryError
from vmferry.migration.inventory import Machine, MachineState
from vmferry.model.facts import Direction, Event, Live, MoveFacts, outgoing
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import TERMINAL, Job
from vmferry.model.problems import Problem, problems
from vmferry.units import Gpa

LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), 1 << 29, 4096, Backing.MEMFD),))


def unknown(what: str) -> VmferryError:
    return VmferryError(Reason.MIGRATION_UNKNOWN, f"No migration {what}.", "Ask for one that is.")


@dataclass
class ScriptedControl:
    """Both controls; `publish` makes a revision, `closed` counts the watches that ended their work."""

    table: dict[str, Job] = field(default_factory=dict)
    history: list[Job] = field(default_factory=list)
    ledgers: dict[str, list[LedgerEntry]] = field(default_factory=dict)
    arrivals: list[MoveFacts] = field(default_factory=list)
    closed: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def publish(self, job: Job) -> None:
        async with self.changed:
            self.table[job.migration] = job
            self.history.append(job)
            self.changed.notify_all()

    async def create(self, migration: str, vm: str, destination: str, push_bytes_per_s: int, requested_by: str) -> Job:
        if migration in self.table:
            raise VmferryError(Reason.MIGRATION_EXISTS, f"{migration} is another move.", "Take another id.")
        job = Job(migration, vm, destination, revision=len(self.history) + 1, created_us=1_000_000)
        job = replace(job, requested_by=requested_by)
        await self.publish(replace(job, push_bytes_per_s=push_bytes_per_s))
        return self.table[migration]

    async def job(self, migration: str) -> Job:
        if migration not in self.table:
            raise unknown(migration)
        return self.table[migration]

    async def validate(self, vm: str, destination: str) -> str:
        if vm == "none":
            raise VmferryError(Reason.VM_UNKNOWN, f"No VM {vm}.", "Ask for one that is.")
        return destination.partition(":")[0]

    def of_job(self, job: Job) -> MoveFacts:
        return outgoing("host-a", job, Live(), 2_000_000)

    async def facts(self, migration: str, direction: Direction | None) -> MoveFacts:
        if direction is Direction.IN:
            return next(facts for facts in self.arrivals if facts.migration == migration)
        return replace(self.of_job(await self.job(migration)), events=(Event("host-b", 1, 3, "QUEUED", "words"),))

    def incoming(self) -> Sequence[MoveFacts]:
        return self.arrivals

    async def watch_incoming(self) -> AsyncIterator[MoveFacts]:
        for facts in self.arrivals:
            yield facts

    async def delete(self, migration: str, direction: Direction | None) -> None:
        await self.job(migration)
        del self.table[migration]

    async def problems(self) -> Sequence[Problem]:
        return problems("host-a", [*map(self.of_job, self.table.values()), *self.arrivals], (), 0, 2_000_000)

    async def jobs(self) -> Sequence[Job]:
        return list(self.table.values())

    async def set_push_limit(self, migration: str, push_bytes_per_s: int) -> Job:
        job = await self.job(migration)
        if job.phase in TERMINAL:
            raise VmferryError(Reason.MIGRATION_ENDED, f"{migration} has ended.", "Start another.")
        await self.publish(replace(job, push_bytes_per_s=push_bytes_per_s, revision=len(self.history) + 1))
        return self.table[migration]

    async def cancel(self, migration: str) -> Job:
        await self.job(migration)
        raise VmferryError(Reason.PAST_NO_RETURN, "It runs on the destination.", "Wait for it.")

    async def watch(self, migration: str, after_revision: int) -> AsyncIterator[Job]:
        if migration:
            await self.job(migration)
        try:
            seen = after_revision
            while True:
                for job in self._newer(migration, seen):
                    seen = job.revision
                    yield job
                    if migration and job.phase in TERMINAL:
                        return
                async with self.changed:
                    await self.changed.wait_for(lambda: bool(self._newer(migration, seen)))  # noqa: B023
        finally:
            self.closed += 1

    async def watch_from_now(self) -> AsyncIterator[Job]:
        for job in self.table.values():
            yield job

    def _newer(self, migration: str, seen: int) -> list[Job]:
        return [job for job in self.history if job.revision > seen and migration in ("", job.migration)]

    async def machines(self) -> Sequence[Machine]:
        def machine(vm: str, state: MachineState) -> Machine:
            return Machine(vm, state, LAYOUT, 2, "x86_64/kvm", len(self.ledgers.get(vm, [])), "", 7, None)

        return [
            machine("web-2", MachineState.RUNNING),
            machine("web-1", MachineState.INCOMING),
            machine("web-1", MachineState.RUNNING),
        ]

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        if vm not in self.ledgers:
            raise VmferryError(Reason.VM_UNKNOWN, f"No VM {vm}.", "Ask for one that is.")
        return self.ledgers[vm]

    async def watch_errors(self, vm: str, after_revision: int) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        for number, entry in enumerate(await self.ledger(vm), start=1):
            if number > after_revision:
                yield number, vm, entry

    async def report_error(self, vm: str, gpa: int, lsb: int) -> LedgerEntry:
        await self.ledger(vm)
        entry = LedgerEntry(Gpa(gpa), Origin.OPERATOR, lsb)
        self.ledgers[vm].append(entry)
        return entry
