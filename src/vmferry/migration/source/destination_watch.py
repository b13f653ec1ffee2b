"""Watches the destination's daemon during postcopy and turns its reports into events of `state_machine.py`.

The memory errors of a report are durable here before any other part of it is used. Progress is shown at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.environment import Environment
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.job_record import JobRecord
from vmferry.migration.source.steps import SourceSteps
from vmferry.model.incoming import IncomingUpdate
from vmferry.model.migration import Outcome


class DestinationWatch:
    """Owner of one job's stream of reports. It connects again without end."""

    def __init__(
        self, environment: Environment, recorder: LedgerRecorder, record: JobRecord, steps: SourceSteps
    ) -> None:
        self._environment = environment
        self._recorder = recorder
        self._record = record
        self._steps = steps
        self._updates: AsyncIterator[IncomingUpdate] | None = None
        self._backoff = environment.backoff()

    async def next_event(self) -> m.Event:
        """The next report that changes the job. Progress alone is only shown."""
        while True:
            try:
                update = await self._next_update()
                await self._take_in(update)
            except VmferryError as error:
                await self.close()
                await self._backoff.pause()
                if self._record.job.reason_code is not Reason.DESTINATION_UNREACHABLE:
                    return m.DestinationSilent(f"the destination's daemon does not report: {error.message}")
                continue
            self._backoff = self._environment.backoff()
            event = self._event(update)
            if event is not None:
                return event

    async def close(self) -> None:
        """Ends the stream, if there is one. `next_event` opens another."""
        updates, self._updates = self._updates, None
        close = getattr(updates, "aclose", None)
        if close is not None:
            await close()

    async def _next_update(self) -> IncomingUpdate:
        if self._updates is None:
            self._updates = self._steps.updates()
        try:
            return await anext(self._updates)
        except StopAsyncIteration:
            raise VmferryError(Reason.DESTINATION_UNREACHABLE, "its stream of reports ended.") from None

    async def _take_in(self, update: IncomingUpdate) -> None:
        job = self._record.job
        known = job.memory_errors
        if update.errors:
            await self._recorder.take(job.vm, update.errors)
            known = await self._recorder.count(job.vm)
        self._record.show_progress(update.progress, known)

    def _event(self, update: IncomingUpdate) -> m.Event | None:
        """The event of a report. None: the job does not change."""
        if update.lost_reason:
            return m.DestinationDied(update.lost_reason)
        if update.outcome is Outcome.COMPLETED:
            return m.DestinationCompleted()
        job = self._record.job
        shown = job.reason if job.reason_code is not None else ""
        if update.paused_reason != shown or job.reason_code is Reason.DESTINATION_UNREACHABLE:
            return m.DestinationReported(update.paused_reason)
        return None
