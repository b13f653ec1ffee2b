"""The limit of a job's background push on its source: durable first, then sent to the pager.

A change can come at any moment of the job, during any of its steps.
"""

from __future__ import annotations

import asyncio

import structlog

from vmferry.errors import VmferryError
from vmferry.migration.environment import Environment, Spawn
from vmferry.migration.source.job_record import JobRecord
from vmferry.migration.source.steps import RETRY, SourceSteps
from vmferry.model.migration import Job

log = structlog.get_logger()


class PushLimit:
    """Changes of one job's push limit, in tasks of their own."""

    def __init__(self, environment: Environment, record: JobRecord, steps: SourceSteps, spawn: Spawn) -> None:
        self._environment = environment
        self._record = record
        self._steps = steps
        self._spawn = spawn
        self._task = f"push limit {record.job.migration}"
        self._log = log.bind(migration=record.job.migration, vm=record.job.vm)

    async def change(self, push_bytes_per_s: int) -> Job:
        """Makes the limit durable and sends it to the source's pager, also if it is the same limit.

        A pager that does not answer gets the limit once it does. The change continues if its caller is cancelled, so
        that the store and the pager agree.

        Raises: VmferryError MIGRATION_ENDED, STORE_FAILED: nothing has changed.
        """
        answer: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._spawn(self._task, self._change(push_bytes_per_s, answer))
        return await answer

    async def _change(self, push_bytes_per_s: int, answer: asyncio.Future[Job]) -> None:
        try:
            await self._record.save_push_limit(push_bytes_per_s)
        except VmferryError as error:
            if not answer.done():
                answer.set_exception(error)
            return
        except BaseException:
            answer.cancel()
            raise
        self._steps.push_bytes_per_s = self._record.job.push_bytes_per_s
        try:
            await self._steps.tell_push_limit()
        except VmferryError as error:
            self._log.warning(RETRY, step="push limit", error=str(error))
            self.tell_again()
        finally:
            if not answer.done():
                answer.set_result(self._record.job)

    def tell_again(self) -> None:
        """Sends the limit again after a restart: the daemon may have died between the store and the pager."""
        self._spawn(self._task, self._tell_until_heard())

    async def _tell_until_heard(self) -> None:
        backoff = self._environment.backoff()
        while self._steps.serving:
            try:
                await self._steps.tell_push_limit()
            except VmferryError as error:
                self._log.warning(RETRY, step="push limit", error=str(error))
            else:
                return
            await backoff.pause()
