"""Network namespaces, sockets in them, and a way to a daemon that lives in one."""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces that nothing is connected to."""
    tag = f"{os.getpid():x}{secrets.token_hex(2)}"
    names = (f"vmferry-{tag}-c", f"vmferry-{tag}-d")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """The calling thread makes its sockets in the namespace."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    target = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(target)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(target)
        os.close(home)


def _enter(fd: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


class Relay:
    """Listens on a port of this network's loopback and forwards to the same port of a namespace's loopback.

    So this process reaches a daemon's API without a way of its own into the network under test.
    """

    def __init__(self, namespace: str, port: int) -> None:
        self._namespace = namespace
        self._port = port
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        try:
            inner = await asyncio.to_thread(_connect_in, self._namespace, self._port)
            inner_reader, inner_writer = await asyncio.open_connection(sock=inner)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, inner_writer))
                both.create_task(_pump(inner_reader, writer))
        except* OSError:
            pass  # the daemon is not there: the caller's connection ends, which is what it would meet
        finally:
            writer.close()


def _connect_in(namespace: str, port: int) -> socket.socket:
    with inside(namespace):
        return socket.create_connection(("127.0.0.1", port))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
