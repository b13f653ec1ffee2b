"""One job of this host, in memory and in the store.

The job's own task writes its phase, its reason and its progress. Any task may write its push limit. Writes to the store
come one at a time, and each keeps the values of the others.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from vmferry.errors import Reason, VmferryError
from vmferry.migration.source.job_feed import JobFeed
from vmferry.model.migration import TERMINAL, Job, PageProgress
from vmferry.ports import Clock


class JobRecord:
    """Owner of the job's values. All methods but `save_push_limit` are for the job's own task."""

    def __init__(self, jobs: JobFeed, clock: Clock, job: Job) -> None:
        self._jobs = jobs
        self._clock = clock
        self._job = job
        self._saving = asyncio.Lock()

    @property
    def job(self) -> Job:
        return self._job

    def stage(self, job: Job) -> None:
        """Changes the job in memory; the next save makes it durable and shows it to watchers.

        `job` must be made from the current one without an await in between.
        """
        self._job = job

    async def save(self, job: Job) -> None:
        """Makes the job durable under the next revision. The push limit is always the newest, not that of `job`.

        Raises: VmferryError STORE_FAILED: the job in memory is the one before.
        """
        async with self._saving:
            self._job = await self._jobs.save(replace(job, push_bytes_per_s=self._job.push_bytes_per_s))

    async def save_push_limit(self, push_bytes_per_s: int) -> None:
        """Makes the limit durable. It writes nothing if the limit is the same.

        Raises: VmferryError MIGRATION_ENDED, STORE_FAILED.
        """
        async with self._saving:
            if self._job.phase in TERMINAL:
                raise ended(self._job)
            if push_bytes_per_s == self._job.push_bytes_per_s:
                return
            now = self._clock.now_us()
            limited = replace(self._job, push_bytes_per_s=push_bytes_per_s, updated_us=now)
            revision = (await self._jobs.save(limited)).revision
            # Progress may have changed during the save.
            self._job = replace(self._job, push_bytes_per_s=push_bytes_per_s, updated_us=now, revision=revision)

    def show_progress(self, progress: PageProgress, memory_errors: int) -> None:
        """Shows progress to watchers at once, without a revision of its own."""
        self._job = self._jobs.show_progress(self._job, progress, memory_errors)


def ended(job: Job) -> VmferryError:
    """The error for a change to an ended job, for the caller to raise."""
    return VmferryError(
        Reason.MIGRATION_ENDED,
        f"{job.migration} has ended ({job.phase}); there is no push to limit.",
        "A new migration takes its limit from its request.",
    )
