"""A listener that takes its time: each connection is open at once and carries nothing for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def late_listener(
    listen: Callable[[Callable[..., Awaitable[None]]], Awaitable[asyncio.Server]],
    connect: Callable[[], Awaitable[Streams]],
    late_s: float,
) -> AsyncIterator[asyncio.Server]:
    """Forwards each connection to `listen` to a new one by `connect`, `late_s` after it came."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(late_s)
        inner_reader, inner_writer = await connect()
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))

    server = await listen(serve)
    try:
        yield server
    finally:
        server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # one end went: so does the other
    finally:
        writer.close()
