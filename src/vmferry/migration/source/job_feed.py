"""The jobs of this daemon as watchers see them: the durable revision, and the progress since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace
from itertools import islice

from vmferry.aio.change_signal import ChangeSignal
from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import TERMINAL, Job, PageProgress, Phase
from vmferry.ports import Store

BATCH = 256
TELL_LATER_S = 0.02
"""The delay before watchers see a switchover: about the length of a blackout."""


class JobFeed:
    """Owner of the watchers' view. All writes go through it, so watchers miss none."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = ChangeSignal()
        self._saves = 0
        """Counts ended saves, also those that failed. Between two equal counts the disk has nothing new."""
        self._progress: dict[str, Job] = {}
        self._active: dict[str, Job] = {}
        self._ended: dict[str, Job] = {}
        """All jobs of this host, as they are on disk; the ended ones in the order of their ends, until `forget`."""
        self._doubtful: set[str] = set()
        """The jobs whose last save failed or was cancelled: it may be on disk all the same."""

    async def load(self) -> None:
        """Reads all jobs once. Raises: VmferryError STORE_FAILED."""
        jobs = await self._store.jobs()
        for job in sorted(jobs, key=lambda job: job.ended_us):
            self._keep(job)

    async def save(self, job: Job) -> Job:
        """Makes the job durable under the next revision, then shows it to watchers.

        Watchers see it at once, except a switchover: their work would lengthen the blackout.
        """
        try:
            saved = await self._store.save_job(job)
        except BaseException:
            self._doubtful.add(job.migration)
            raise
        finally:
            self._saves += 1
        self._doubtful.discard(job.migration)
        self._keep(saved)
        self._progress.pop(saved.migration, None)
        if saved.phase is Phase.SWITCHOVER:
            asyncio.get_running_loop().call_later(TELL_LATER_S, self._changed.notify)
        else:
            self._changed.notify()
        return saved

    def show_progress(self, job: Job, progress: PageProgress, memory_errors: int) -> Job:
        """Shows progress to watchers at once, without a revision of its own."""
        now = replace(job, progress=progress, memory_errors=memory_errors)
        if now != job:
            self._progress[job.migration] = now
            self._changed.notify()
        return now

    async def get(self, migration: str) -> Job:
        """One job with its newest progress. Raises: VmferryError MIGRATION_UNKNOWN."""
        job = await self.find(migration)
        if job is None:
            raise VmferryError(
                Reason.MIGRATION_UNKNOWN,
                f"no migration {migration!r} on this host.",
                "`vmferry list` shows the migrations of a host, in both directions.",
            )
        return job

    async def find(self, migration: str) -> Job | None:
        """One job with its newest progress, if there is one."""
        await self._settle_doubts()
        job = self._active.get(migration) or self._ended.get(migration)
        return None if job is None else self._live(job)

    async def all(self) -> list[Job]:
        """All jobs, the ended ones first, in the order of their ends."""
        await self._settle_doubts()
        return [*self._ended.values(), *(self._live(job) for job in self._active.values())]

    async def active(self) -> list[Job]:
        """The jobs that have not ended."""
        await self._settle_doubts()
        return [self._live(job) for job in self._active.values()]

    def ended(self, limit: int) -> list[Job]:
        """The jobs that ended last, the newest first."""
        return list(islice(reversed(self._ended.values()), limit))

    @property
    def newest_revision(self) -> int:
        """The highest revision of a job that is kept; 0: there is none."""
        return max((job.revision for job in (*self._active.values(), *self.ended(1))), default=0)

    @property
    def ended_count(self) -> int:
        return len(self._ended)

    def forget(self, migrations: Collection[str]) -> None:
        """Lets go of ended jobs that the store has deleted."""
        for migration in migrations:
            self._ended.pop(migration, None)

    def _keep(self, job: Job) -> None:
        ended = job.phase in TERMINAL
        (self._active if ended else self._ended).pop(job.migration, None)
        (self._ended if ended else self._active)[job.migration] = job

    async def _settle_doubts(self) -> None:
        for migration in tuple(self._doubtful):
            job = await self._store.job(migration)
            if job is not None and migration in self._doubtful:  # A later save may have settled it.
                self._keep(job)
            self._doubtful.discard(migration)

    async def watch(self, migration: str, after_revision: int) -> AsyncIterator[Job]:
        """Yields every revision after one, without gaps, then live. Between revisions it yields progress under the same
        one.

        A watch of one migration ends after the terminal revision; "" watches all, without end. Raises: VmferryError
        MIGRATION_UNKNOWN.
        """
        ended = bool(migration) and (await self.get(migration)).phase in TERMINAL
        shown: dict[str, Job] = {}
        at = after_revision
        read: int | None = None
        while True:
            seen = self._changed.count
            batch: Sequence[Job] = ()
            if read != self._saves:
                read = self._saves
                batch = await self._store.job_revisions(at, BATCH)
            for job in batch:
                at = job.revision
                if migration in ("", job.migration):
                    shown[job.migration] = job
                    yield job
                    if migration and job.phase in TERMINAL:
                        return
            if batch:
                read = None if len(batch) == BATCH else read  # there may be more
                continue
            if ended:
                return
            for job in self._fresh_progress(migration, shown):
                shown[job.migration] = job
                yield job
            await self._changed.wait_after(seen)

    def _fresh_progress(self, migration: str, shown: dict[str, Job]) -> list[Job]:
        return [
            job
            for job in self._progress.values()
            if migration in ("", job.migration)
            and job != shown.get(job.migration)
            and not (job.migration in shown and job.revision < shown[job.migration].revision)
        ]

    def _live(self, job: Job) -> Job:
        shown = self._progress.get(job.migration)
        return shown if shown is not None and shown.revision == job.revision else job
