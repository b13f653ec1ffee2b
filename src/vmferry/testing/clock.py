"""A clock that tests move. If it moves by itself, each sleep moves it and takes no real time."""

from __future__ import annotations

import asyncio

MICROSECONDS = 1_000_000


class ManualClock:
    """`now_us` and `monotonic_s` move together: by `advance`, and with `by_itself` by every `sleep`."""

    def __init__(self, *, by_itself: bool = True, now_us: int = 1_700_000_000 * MICROSECONDS) -> None:
        self._now_us = now_us
        self._start_us = now_us
        self._by_itself = by_itself
        self._moved = asyncio.Event()

    def now_us(self) -> int:
        return self._now_us

    def monotonic_s(self) -> float:
        return (self._now_us - self._start_us) / MICROSECONDS

    def advance(self, seconds: float) -> None:
        self._now_us += round(seconds * MICROSECONDS)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def set_back(self, seconds: float) -> None:
        """Sets the wall clock back, as an operator may. `monotonic_s` does not change."""
        self._now_us -= round(seconds * MICROSECONDS)
        self._start_us -= round(seconds * MICROSECONDS)

    def stop(self) -> None:
        """From now on only `advance` moves it."""
        self._by_itself = False

    async def sleep(self, seconds: float) -> None:
        if self._by_itself:
            await asyncio.sleep(0.0002)
            if self._by_itself:
                self.advance(seconds)
                return
        until_us = self._now_us + round(seconds * MICROSECONDS)
        while self._now_us < until_us:
            await self._moved.wait()
