"""Pauses between attempts that grow up to a limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


class Backoff:
    """The pauses of one retry loop: each is twice as long as the one before, up to `max_s`."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]], first_s: float, max_s: float) -> None:
        self._sleep = sleep
        self._next_s = first_s
        self._max_s = max_s

    async def pause(self) -> None:
        await self._sleep(self._next_s)
        self._next_s = min(self._next_s * 2, self._max_s)
