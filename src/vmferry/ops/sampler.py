"""Reads the daemon's state for all viewers: one read at a time, shared by all.

It owns the newest document. It reads every `FAST_S` while a page is open, otherwise every `SLOW_S`. A read
that fails keeps the last document and is reported as `error`; it does not end the endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import structlog

from vmferry.ops.document import Document, render
from vmferry.ops.state import State, StateSource

FAST_S = 0.25
SLOW_S = 5.0
OPS_STATE_FAILED = "ops.state_failed"

_log = structlog.stdlib.get_logger()


class Sampler:
    """The newest state, its document, and a stream of the documents that differ."""

    def __init__(self, source: StateSource, version: str) -> None:
        self._source = source
        self._version = version
        self._reading = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._look = asyncio.Event()
        self._watchers = 0
        self._number = 0
        self._document: Document = {}
        self._state: State | None = None
        self.error = ""

    async def sample(self) -> tuple[State, Document]:
        """Reads the state now. Raises: the source's error."""
        async with self._reading:
            state = await self._source.state()
            # In a thread: many migrations take milliseconds, and the loop serves switchovers.
            document, moved = await asyncio.to_thread(_rendered, state, self._version, self._document)
            self._state, self._document, self.error = state, document, ""
        if moved:
            async with self._changed:
                self._number += 1
                self._changed.notify_all()
        return state, document

    async def documents(self, heartbeat_s: float) -> AsyncGenerator[Document | None, None]:
        """Yields the document now, then each that differs from the one before; None after `heartbeat_s` without a
        change.
        """
        self._watchers += 1
        self._look.set()
        try:
            await self.sample()
            seen = self._number
            yield self._document
            while True:
                try:
                    async with asyncio.timeout(heartbeat_s), self._changed:
                        await self._changed.wait_for(lambda: self._number != seen)  # noqa: B023 - called at once
                except TimeoutError:
                    yield None
                    continue
                seen = self._number
                yield self._document
        finally:
            self._watchers -= 1

    async def run(self) -> None:
        """The reading task. It never returns."""
        while True:
            try:
                await self.sample()
            except Exception as error:  # noqa: BLE001 - whatever fails in reading is shown, and tried again
                if not self.error:
                    _log.warning(OPS_STATE_FAILED, error=repr(error))
                self.error = str(error) or repr(error)
            self._look.clear()
            try:
                async with asyncio.timeout(FAST_S if self._watchers else SLOW_S):
                    await self._wait_for_look()
            except TimeoutError:
                continue

    async def _wait_for_look(self) -> None:
        """Waits for the interval. A new viewer cuts it short once."""
        await self._look.wait()
        await asyncio.sleep(FAST_S)


def _rendered(state: State, version: str, before: Document) -> tuple[Document, bool]:
    """The document, and whether it differs from the one before."""
    document = render(state, version)
    return document, _without_time(document) != _without_time(before)


def _without_time(document: Document) -> Document:
    return {key: value for key, value in document.items() if key != "at_us"}
