"""Two connected streams: bytes of each go to the other, at the pace of the slower one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast


class Half(asyncio.Protocol):
    """One of the two connections. It reads nothing before `join`."""

    def __init__(self, ended: Callable[[Exception | None], None]) -> None:
        """`ended` is called once, with the error that broke this connection, or None."""
        self.transport: asyncio.Transport | None = None
        self.received = False
        """Whether a byte has come."""
        self.closed_here = False
        """Whether this process has closed the connection."""
        self._other: Half | None = None
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self.received = True
        if self._other is not None and self._other.transport is not None:
            self._other.transport.write(data)

    def pause_writing(self) -> None:
        if self._other is not None and self._other.transport is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and self._other.transport is not None:
            self._other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._other is not None:
            self._other.close()
        self._ended(exc)

    def close(self) -> None:
        self.closed_here = True
        if self.transport is not None:
            self.transport.close()


def join(one: Half, other: Half) -> None:
    """Lets the bytes flow. Both are connected."""
    one._other, other._other = other, one
    for half, its_other in ((one, other), (other, one)):
        if half.transport is None or half.transport.is_closing():
            its_other.close()
        else:
            half.transport.resume_reading()
