"""Tells watchers that something has changed. The store keeps the facts, so a missed signal loses nothing."""

from __future__ import annotations

import asyncio


class ChangeSignal:
    """A counter of changes. Each watcher remembers the count that it has seen and waits for a higher one."""

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
