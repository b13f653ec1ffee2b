"""A monitor between the daemon and a real QEMU: it passes everything on, and does a test's mischief at one command."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tests.support.qemu import ANSWER_S, Vm
from vmferry.demo.patience import patient

ACT_S = patient(20.0)


class Mischief(Enum):
    DROP = "QEMU never sees the command"
    MUTE = "QEMU carries it out, its answer is lost"
    LIE = "its answer is something else"
    CLOSE = "the connection ends"


@dataclass
class QmpProxy:
    """`at`: the act of a test before a command is passed on, once; it may return a mischief."""

    qemu: Path
    loop: asyncio.AbstractEventLoop
    at: dict[str, Callable[[], Awaitable[Mischief | None]]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    """All commands, in order."""
    _wrong: dict[object, Mischief] = field(default_factory=dict)
    """By the id of the command."""
    _sockets: list[socket.socket] = field(default_factory=list)

    def serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                daemon, _ = listener.accept()
                qemu = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                qemu.connect(str(self.qemu))
                self._sockets += [daemon, qemu]
                for work in (self._to_qemu, self._to_daemon):
                    threading.Thread(target=self._pass, args=(work, daemon, qemu), daemon=True).start()

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _pass(
        self, work: Callable[[socket.socket, socket.socket], None], daemon: socket.socket, qemu: socket.socket
    ) -> None:
        with suppress(OSError, ValueError):
            work(daemon, qemu)
        for one in (daemon, qemu):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _to_qemu(self, daemon: socket.socket, qemu: socket.socket) -> None:
        text, fds = "", []
        while True:
            data, came, _, _ = socket.recv_fds(daemon, 1 << 16, 8)
            if not data:
                return
            fds += came
            text += data.decode()
            while text.strip():
                try:
                    command, end = json.JSONDecoder().raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[end:]
                passes = [fds.pop(0)] if command["execute"] in {"add-fd", "getfd"} and fds else []
                if self._may_pass(command):
                    socket.send_fds(qemu, [json.dumps(command).encode()], passes)

    def _may_pass(self, command: dict[str, Any]) -> bool:
        name = command["execute"]
        self.seen.append(name)
        act = self.at.pop(name, None)
        if act is None:
            return True
        mischief = asyncio.run_coroutine_threadsafe(_done(act), self.loop).result(ACT_S)
        if mischief is Mischief.CLOSE:
            raise ConnectionResetError
        if mischief in {Mischief.MUTE, Mischief.LIE}:
            self._wrong[command.get("id")] = mischief
        return mischief is not Mischief.DROP

    def _to_daemon(self, daemon: socket.socket, qemu: socket.socket) -> None:
        for line in qemu.makefile("rb"):
            answer = json.loads(line)
            wrong = self._wrong.pop(answer.get("id"), None) if "id" in answer else None
            if wrong is Mischief.MUTE:
                continue
            told = {"return": [["no", 7]], "id": answer["id"]} if wrong is Mischief.LIE else answer
            daemon.sendall(json.dumps(told).encode() + b"\r\n")


async def _done(act: Callable[[], Awaitable[Mischief | None]]) -> Mischief | None:
    return await act()


@asynccontextmanager
async def proxy_of(vm: Vm, path: Path) -> AsyncIterator[QmpProxy]:
    """A monitor at `path`, where the daemon looks for one. QEMU has the socket too, as proof that it is its own."""
    proxy = QmpProxy(vm.adopted, asyncio.get_running_loop())
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        await vm.monitor.get_fd(listener.fileno(), "proxy", ANSWER_S)
        threading.Thread(target=proxy.serve, args=(listener,), daemon=True).start()
        try:
            yield proxy
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            proxy.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 a local socket
