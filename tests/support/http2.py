"""HTTP/2 frames as a stranger may send them (RFC 9113, RFC 7541)."""

from __future__ import annotations

import asyncio
import contextlib

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS = 4, 1
END_STREAM_AND_HEADERS = 0x5


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def request(path: bytes) -> bytes:
    """A whole gRPC request without a message: POST, http, `path`, te and content-type, in literal HPACK fields."""
    fields = (
        b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01\x01x\x40\x02te\x08trailers\x0f\x10\x10application/grpc"
    )
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_STREAM_AND_HEADERS, 1, fields)


async def send(host: str, port: int, packet: bytes) -> bytes:
    """Sends it, and gives the first bytes that come back within a second."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(packet)
    await writer.drain()
    answer = b""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(1):
            answer = await reader.read(4096)
    writer.close()
    return answer
