"""Tells watchers that something is new. The store is the truth: a bell that is missed loses nothing."""

from __future__ import annotations

import asyncio


class ChangeSignal:
    """A counter that can be waited for. Each watcher remembers the count it has seen."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def count(self) -> int:
        return self._count

    def notify(self) -> None:
        self._count += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def wait_after(self, seen: int) -> int:
        """Returns the count once it is above `seen`."""
        while self._count <= seen:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return self._count
