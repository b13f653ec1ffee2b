"""The answer of /healthz: the process lives, and its event loop is on time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

BEAT_S = 0.5
LAG_LIMIT_S = 5.0
"""An event loop that is later than this does not serve its VMMs and peers in time."""


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool
    loop_lag_s: float
    tasks: int
    causes: tuple[str, ...]


class Pulse:
    """Measures the lag of the event loop by a task that wakes every `BEAT_S`."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + BEAT_S
        self._lag_s = 0.0

    async def run(self) -> None:
        """The measuring task. It never returns."""
        while True:
            self._due_s = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._lag_s = max(0.0, time.monotonic() - self._due_s)

    @property
    def lag_s(self) -> float:
        """The last lag, or the lateness of the beat that is due."""
        return max(self._lag_s, time.monotonic() - self._due_s)

    def health(self) -> Health:
        lag_s = self.lag_s
        causes = (f"event loop late by {lag_s:.1f} s, limit {LAG_LIMIT_S:g} s",) if lag_s > LAG_LIMIT_S else ()
        return Health(not causes, lag_s, len(asyncio.all_tasks()), causes)
