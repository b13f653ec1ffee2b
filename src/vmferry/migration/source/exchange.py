"""Tells the destination's daemon the facts of this host, and takes in its facts, as long as a job runs.

It asks often while something changes, seldom otherwise, and never during a blackout. A silent destination changes
nothing: the facts are for people, and no decision reads them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from vmferry.aio.concurrency import race
from vmferry.errors import VmferryError
from vmferry.migration.side import Side
from vmferry.migration.source.steps import SourceSteps
from vmferry.model.migration import Job, Phase

EVERY_S = 1.0
LEAST_S = 0.2
LAST_S = 1.0
"""The last exchange of a job that has ended waits this long at most."""


class Exchange:
    """The exchange of one job."""

    def __init__(self, side: Side, steps: SourceSteps, job: Callable[[], Job]) -> None:
        self._side = side
        self._steps = steps
        self._job = job
        self._told = 0
        """The highest number of this host's events that the destination has."""

    async def run(self) -> None:
        """It never returns."""
        while True:
            seen = self._side.changed.count
            self._side.look()
            if self._job().phase is not Phase.SWITCHOVER:
                await self.once()
            await asyncio.sleep(LEAST_S)
            await race(asyncio.sleep(EVERY_S - LEAST_S), self._changed(seen))

    async def once(self) -> None:
        """One exchange, if the destination knows the job."""
        if not self._steps.asked_destination:
            return
        job = self._job()
        here = self._side.facts(
            self._told,
            phase=job.phase,
            phase_since_us=job.course[-1].at_us if job.course else job.created_us,
            reason_code=str(job.reason_code or ""),
            reason=job.reason,
            requested_by=job.requested_by,
        )
        with suppress(VmferryError):
            there, self._told = await self._steps.peer.exchange(job.migration, here, self._side.heard_events())
            self._side.hear(there)

    async def last(self) -> None:
        """The exchange after the end of the job."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self.once()

    async def _changed(self, seen: int) -> None:
        await self._side.changed.wait_after(seen)
