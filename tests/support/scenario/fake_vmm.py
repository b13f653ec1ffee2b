"""A VMM that misbehaves on purpose: speaks the VMM protocol over plain sockets, with a real userfaultfd."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmferry.cli.probe import libc
from vmferry.demo.patience import patient

Region = dict[str, Any]


def frame(message: dict[str, Any] | bytes) -> bytes:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def hello(vm: str, state: str = "incoming", **changes: Any) -> dict[str, Any]:
    """A good first message, but for `changes`."""
    return {
        "type": "hello",
        "version": 1,
        "vm": vm,
        "pid": os.getpid(),
        "platform": "x86_64/process",
        "vcpus": 0,
        "regions": [],
        "abilities": ["source", "destination", "memory_errors"],
        "state": state,
        **changes,
    }


class Attachment:
    """What a destination hands to the pager: the layout as asked for, mapped and registered, until a test spoils it."""

    def __init__(self, vm: str, regions: Sequence[Region]) -> None:
        self.uffd = libc.userfaultfd(0)
        libc.uffd_api(self.uffd, libc.FEATURE_POISON)
        self.descriptors = [self.uffd]
        sent = []
        for region in regions:
            hva = libc.mmap(region["size"], libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
            libc.register(self.uffd, hva, region["size"], libc.REGISTER_MODE_MISSING)
            sent.append({**region, "base_host_virt_addr": hva})
        self.message: Any = {
            "version": 1,
            "vm": vm,
            "role": "destination",
            "pid": os.getpid(),
            "uffd": 0,
            "regions": sent,
        }

    def attach(self, path: str) -> dict[str, Any]:
        """Sends it in one message; returns the pager's answer, {} if it only hung up."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as memory:
            memory.settimeout(patient(5))
            memory.connect(path)
            body = self.message if isinstance(self.message, bytes) else json.dumps(self.message).encode()
            with suppress(BrokenPipeError):
                socket.send_fds(memory, [body], self.descriptors)
                return read_frame(memory)
            return {}

    def close(self) -> None:
        os.close(self.uffd)


def read_frame(stream: socket.socket) -> dict[str, Any]:
    """The next frame, {} at the end of the stream."""
    head = _exactly(stream, 4)
    if len(head) < 4:
        return {}
    return dict(json.loads(_exactly(stream, struct.unpack(">I", head)[0])))


def _exactly(stream: socket.socket, count: int) -> bytes:
    found = b""
    with suppress(ConnectionResetError):
        while len(found) < count and (piece := stream.recv(count - len(found))):
            found += piece
    return found


class IncomingVmm:
    """Waits to be a destination; on `prepare` attaches memory after `spoil` had its way with it."""

    def __init__(self, vm: str, spoil: Callable[[Attachment], None]) -> None:
        self._vm = vm
        self._spoil = spoil
        self.pager_said: dict[str, Any] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, vmm_socket: Path) -> None:
        reader, self._writer = await asyncio.open_unix_connection(str(vmm_socket))
        self._writer.write(frame(hello(self._vm)))
        assert (await self._next(reader))["type"] == "welcome"
        self._task = asyncio.create_task(self._serve(reader), name="incoming vmm")

    async def _next(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        return dict(json.loads(await reader.readexactly(length)))

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        assert self._writer is not None
        with suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                request = await self._next(reader)
                if "id" in request:
                    self._writer.write(frame(await self._answer(request)))

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["type"] != "prepare":
            return {"type": "reply", "id": request["id"]}
        attachment = Attachment(self._vm, request["regions"])
        self._spoil(attachment)
        self.pager_said = await asyncio.to_thread(attachment.attach, request["socket"])
        attachment.close()
        if self.pager_said.get("type") == "attached":
            return {"type": "reply", "id": request["id"]}
        words = f"the pager refused the memory: {self.pager_said}"
        return {"type": "error", "id": request["id"], "code": "FAILED", "field": "", "message": words}

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
