"""The facts of all migrations of this host, in both directions, for API, metrics and page; and the end of history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.destination.incoming_service import IncomingService
from vmferry.migration.environment import Environment, History
from vmferry.migration.source.job_feed import JobFeed
from vmferry.migration.source.job_runner import JobRunner
from vmferry.model.facts import Direction, Event, Live, MoveFacts, merged, outgoing
from vmferry.model.migration import TERMINAL, Job
from vmferry.model.totals import Totals

log = structlog.get_logger()

FORGOTTEN = "history.forgotten"
PRUNING_FAILED = "history.pruning_failed"

LOOK_S = 0.25
"""The pause between two looks of a watcher of incoming migrations."""
PRUNE_EVERY_S = 600.0
AT_ONCE = 200
"""The most migrations that one write forgets: other writes wait for it."""


class MoveBook:
    """Reads the facts. `prune` is a task of the service."""

    def __init__(
        self,
        environment: Environment,
        jobs: JobFeed,
        runners: Mapping[str, JobRunner],
        incoming: IncomingService,
        chronicle: Chronicle,
    ) -> None:
        self._environment = environment
        self._jobs = jobs
        self._runners = runners
        self._incoming = incoming
        self._chronicle = chronicle

    def of_job(self, job: Job) -> MoveFacts:
        """The facts of a revision of a job, without events. Only the newest one has live facts."""
        runner = self._runners.get(job.migration)
        live = runner.side.live if runner is not None and runner.job.revision == job.revision else Live()
        return outgoing(self._environment.host, job, live, self._environment.clock.now_us())

    async def facts(self, migration: str, direction: Direction | None = None) -> MoveFacts:
        """One migration with the events of both hosts: the one out of this host, unless `direction` says IN, else the
        one into it. Raises: VmferryError MIGRATION_UNKNOWN.
        """
        found: MoveFacts | None = None
        if direction is not Direction.IN:
            job = await self._jobs.find(migration)
            found = self.of_job(job) if job is not None else None
        if found is None and direction is not Direction.OUT:
            found = self._incoming.facts(migration)
        if found is None:
            raise VmferryError(
                Reason.MIGRATION_UNKNOWN,
                f"no migration {migration!r} on {self._environment.host}.",
                "`vmferry list` shows the migrations of a host, in both directions.",
            )
        return replace(found, events=merged(await self._chronicle.of(migration)))

    def incoming(self) -> list[MoveFacts]:
        """All migrations into this host, without events."""
        return [*reversed(self._incoming.ended(self._incoming.ended_count)), *self._incoming_now()]

    def _incoming_now(self) -> list[MoveFacts]:
        found = (self._incoming.facts(record.migration) for record in self._incoming.active())
        return [facts for facts in found if facts is not None]

    async def moving(self) -> list[MoveFacts]:
        """The migrations under way, in both directions."""
        return [self.of_job(job) for job in await self._jobs.active()] + self._incoming_now()

    def ended(self, limit: int) -> list[MoveFacts]:
        """The migrations that ended last, in both directions, the newest first."""
        found = [self.of_job(job) for job in self._jobs.ended(limit)] + self._incoming.ended(limit)
        return sorted(found, key=lambda facts: -facts.ended_us)[:limit]

    def ended_count(self) -> int:
        """The ended migrations that are kept."""
        return self._jobs.ended_count + self._incoming.ended_count

    async def watch_incoming(self) -> AsyncIterator[MoveFacts]:
        """Yields each migration into this host as it is, then every change of one. It has no end."""
        shown: dict[str, MoveFacts] = {}
        while True:
            for facts in self.incoming():
                steady = replace(facts, total_s=0.0, spans=())
                if shown.get(facts.migration) != steady:
                    shown[facts.migration] = steady
                    yield facts
            await asyncio.sleep(LOOK_S)

    async def newest_events(self, limit: int) -> Sequence[tuple[str, Event]]:
        """(migration, event) of all migrations, the newest first."""
        return await self._chronicle.newest(limit)

    async def totals(self) -> Totals:
        """The counts of all ended migrations."""
        return await self._environment.store.totals()

    async def delete(self, migration: str, direction: Direction | None = None) -> None:
        """Forgets an ended migration.

        Raises: VmferryError MIGRATION_UNKNOWN; MIGRATION_RUNNING: it has not ended, or its pager still guards poison.
        """
        facts = await self.facts(migration, direction)
        job = await self._jobs.find(migration) if direction is not Direction.IN else None
        record = next((one for one in self._incoming.all() if one.migration == migration), None)
        record = record if direction is not Direction.OUT else None
        guards = record is not None and record.guarded_pages > 0
        if (job is not None and job.phase not in TERMINAL) or (record is not None and not record.ended) or guards:
            why = "its pager guards poisoned pages of the VM" if guards else f"it is {facts.phase}"
            raise VmferryError(
                Reason.MIGRATION_RUNNING,
                f"{migration} cannot be deleted: {why}.",
                "Delete it once it has ended, and its VM has ended or moved on.",
            )
        await self._forget([migration] if job is not None else [], [migration] if record is not None else [])

    async def prune(self, history: History) -> None:
        """Forgets old migrations, now and every ten minutes. It has no end."""
        while True:
            try:
                await self.prune_once(history)
            except VmferryError as error:
                log.warning(PRUNING_FAILED, error=str(error))
            await asyncio.sleep(PRUNE_EVERY_S)

    async def prune_once(self, history: History) -> None:
        """Forgets migrations that are too old or too many."""
        before_us = self._environment.clock.now_us() - int(history.keep_s * 1e6)
        jobs = sorted((-job.ended_us, job.migration) for job in await self._jobs.all() if job.phase in TERMINAL)
        arrived = sorted(
            (-(record.course[-1].at_us if record.course else record.started_us), record.migration)
            for record in self._incoming.all()
            if record.ended and not record.guarded_pages
        )
        old_jobs, old_arrived = _old(jobs, history, before_us), _old(arrived, history, before_us)
        for start in range(0, max(len(old_jobs), len(old_arrived)), AT_ONCE):
            end = start + AT_ONCE
            await self._forget(old_jobs[start:end], old_arrived[start:end])
        if old_jobs or old_arrived:
            log.info(FORGOTTEN, out=len(old_jobs), into=len(old_arrived))

    async def _forget(self, jobs: Sequence[str], incomings: Sequence[str]) -> None:
        await self._environment.store.forget(jobs, incomings)
        self._jobs.forget(jobs)
        self._incoming.forget(incomings)
        for migration in {*jobs, *incomings}:
            self._chronicle.forget(migration)


def _old(ended: Sequence[tuple[int, str]], history: History, before_us: int) -> list[str]:
    """Of (minus the end, id), the newest first: those beyond the number, or before the time."""
    return [name for index, (end, name) in enumerate(ended) if index >= history.keep_most or -end < before_us]
