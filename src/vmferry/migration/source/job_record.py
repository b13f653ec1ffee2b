"""One job of this host, as it is known here and durable in the store.

The job's own task writes its phase, its reason and what it sees of the pages; anybody writes its push limit. Writes to
the store come one at a time, and each keeps what the others have written.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from vmferry.errors import Reason, VmferryError
from vmferry.migration.source.job_feed import JobFeed
from vmferry.model.migration import TERMINAL, Job, PageProgress
from vmferry.ports import Clock


class JobRecord:
    """Owner of the job's values. All but `save_push_limit` belongs to the job's own task."""

    def __init__(self, jobs: JobFeed, clock: Clock, job: Job) -> None:
        self._jobs = jobs
        self._clock = clock
        self._job = job
        self._saving = asyncio.Lock()

    @property
    def job(self) -> Job:
        return self._job

    def stage(self, job: Job) -> None:
        """Known here from now on; durable, and seen by watchers, with the next save. `job` is made from the one that
        is known, with no wait in between."""
        self._job = job

    async def save(self, job: Job) -> None:
        """Durable under the next revision when it returns; the push limit is the newest, whatever `job` holds.

        Raises: VmferryError STORE_FAILED: the job known here is the one before.
        """
        async with self._saving:
            self._job = await self._jobs.save(replace(job, push_bytes_per_s=self._job.push_bytes_per_s))

    async def save_push_limit(self, push_bytes_per_s: int) -> None:
        """Durable when it returns; without a write if it is the limit already.

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
            # Progress may have come meanwhile.
            self._job = replace(self._job, push_bytes_per_s=push_bytes_per_s, updated_us=now, revision=revision)

    def show_progress(self, progress: PageProgress, memory_errors: int) -> None:
        """Seen by watchers at once, without a revision of its own."""
        self._job = self._jobs.show_progress(self._job, progress, memory_errors)


def ended(job: Job) -> VmferryError:
    """A job that nothing can be changed of any more; to be raised."""
    return VmferryError(
        Reason.MIGRATION_ENDED,
        f"{job.migration} has ended ({job.phase}); it pushes nothing any more.",
        "A new migration takes its limit from its request.",
    )
