"""The jobs of this daemon as watchers see them: the durable revision, and the progress since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

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

    async def save(self, job: Job) -> Job:
        """Makes the job durable under the next revision, then shows it to watchers.

        Watchers see it at once, except a switchover: their work would lengthen the blackout.
        """
        try:
            saved = await self._store.save_job(job)
        finally:
            self._saves += 1
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
        job = await self._store.job(migration)
        if job is None:
            raise VmferryError(
                Reason.MIGRATION_UNKNOWN,
                f"no migration {migration!r} on this host.",
                "List them; a migration is known to the daemon of its source.",
            )
        return self._live(job)

    async def all(self) -> list[Job]:
        return [self._live(job) for job in await self._store.jobs()]

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
