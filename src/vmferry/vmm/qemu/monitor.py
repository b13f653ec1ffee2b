"""One connection to a QEMU's monitor (QMP): commands, answers, events, descriptors. `qemu.qmp` speaks the protocol.

A monitor serves one client at a time. Every wait here has an end: a monitor that is silent, closed or malformed is an
error that names the command.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from qemu.qmp import ConnectError, ExecuteError, Message, QMPClient, QMPError, Runstate, StateError
from qemu.qmp.events import EventListener

from vmferry.errors import Reason, VmferryError
from vmferry.vmm.process import peer_of

Answer = TypeVar("Answer")


class AddedFd(msgspec.Struct, frozen=True, rename="kebab"):
    """Answer to `add-fd`; `fd` is the number in QEMU."""

    fdset_id: int
    fd: int


CLOSE_S = 2.0
"""For a monitor that takes nothing more; then the socket is shut."""
REMEDY = "Look at QEMU's log, and whether another program holds this monitor: it serves one client."

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)  # errors are raised here, and logged once


class Monitor:
    """Made by `connect`. Raises VMM_GONE, VMM_REFUSED, VMM_TIMEOUT or VMM_PROTOCOL, each with the path."""

    def __init__(self, path: Path, client: QMPClient, connection: socket.socket) -> None:
        self.path = path
        self._client = client
        self._connection = connection
        self._passing = asyncio.Lock()

    @classmethod
    async def connect(cls, path: Path, within_s: float) -> Monitor:
        """Connects and negotiates. Raises: VmferryError VMM_GONE, VMM_TIMEOUT."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        client = QMPClient(str(path))
        client.events.event_filter = lambda _: False  # it would keep every event of the connection
        try:
            async with asyncio.timeout(within_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
                await client.connect(connection)
        except TimeoutError as error:
            connection.close()
            raise _error(Reason.VMM_TIMEOUT, path, f"sent no greeting within {within_s:g} s") from error
        except (ConnectError, OSError) as error:
            connection.close()
            raise _error(Reason.VMM_GONE, path, f"cannot be used: {error}") from error
        except BaseException:
            connection.close()
            raise
        return cls(path, client, connection)

    @property
    def peer(self) -> tuple[int, str]:
        """The process that made the socket, and the address that it gave it."""
        return peer_of(self._connection), str(self._connection.getpeername())

    async def ask(self, command: str, within_s: float, arguments: Mapping[str, object] | None = None) -> Any:
        """The command's answer."""
        try:
            async with asyncio.timeout(within_s):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise self._said(Reason.VMM_TIMEOUT, f"did not answer {command} within {within_s:g} s") from error
        except ExecuteError as error:
            raise self._said(Reason.VMM_REFUSED, f"refused {command}: {error}") from error
        except (QMPError, StateError, OSError, EOFError) as error:
            raise self._said(Reason.VMM_GONE, f"was closed at {command}: {error}") from error

    async def ask_for(
        self, kind: type[Answer], command: str, within_s: float, arguments: Mapping[str, object] | None = None
    ) -> Answer:
        """The command's answer as a `kind`. Raises: VmferryError VMM_PROTOCOL if it is none."""
        return self._converted(await self.ask(command, within_s, arguments), kind, command)

    async def human(self, line: str, within_s: float) -> str:
        """The text that the human monitor prints, its lines ended by a bare newline."""
        text = await self.ask_for(str, "human-monitor-command", within_s, {"command-line": line})
        return text.replace("\r\n", "\n")

    async def add_fd(self, fd: int, opaque: str, within_s: float) -> AddedFd:
        """Makes the descriptor a set of QEMU's. The caller keeps `fd`."""
        answer = await self._ask_with_fd(fd, "add-fd", within_s, {"opaque": opaque})
        return self._converted(answer, AddedFd, "add-fd")

    async def get_fd(self, fd: int, name: str, within_s: float) -> None:
        """Gives the descriptor a name in QEMU. The caller keeps `fd`."""
        await self._ask_with_fd(fd, "getfd", within_s, {"fdname": name})

    async def _ask_with_fd(self, fd: int, command: str, within_s: float, arguments: Mapping[str, object]) -> Any:
        async with self._passing:  # QEMU keeps the newest descriptor only
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError, AssertionError, AttributeError) as error:
                raise self._said(Reason.VMM_GONE, f"takes no descriptor for {command}: {error}") from error
            return await self.ask(command, within_s, arguments)

    @contextmanager
    def events(self, name: str) -> Iterator[asyncio.Queue[Mapping[str, Any]]]:
        """The `data` of events of this name from here on."""
        queue: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

        def take(event: str, data: Mapping[str, Any]) -> None:
            if event == name:
                queue.put_nowait(data)

        with self._client.listen(_Tap(take)):
            yield queue

    def on_event(self, callback: Callable[[str, Mapping[str, Any]], None]) -> None:
        """Calls back for each event, with its name and data, as long as the connection lives."""
        self._client.register_listener(_Tap(callback))

    async def gone(self) -> str:
        """Waits until the connection ends; returns why."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        try:
            await self._client.disconnect()
        except Exception as error:  # noqa: BLE001 the library passes on any error of its reader
            return str(error) or type(error).__name__
        return "closed"

    async def close(self) -> None:
        """Ends the connection. A monitor that reads nothing more is cut off."""
        cut = asyncio.get_running_loop().call_later(CLOSE_S, self._cut)
        try:
            with suppress(Exception):  # as in `gone`
                await self._client.disconnect()
        finally:
            cut.cancel()

    def _converted(self, answer: Any, kind: type[Answer], command: str) -> Answer:
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise self._said(Reason.VMM_PROTOCOL, f"answered {command} with something else: {error}") from error

    def _cut(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _said(self, reason: Reason, what: str) -> VmferryError:
        return _error(reason, self.path, what)


class _Tap(EventListener):
    """Hands events on; keeps none."""

    def __init__(self, callback: Callable[[str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._callback = callback

    def accept(self, event: Message) -> bool:
        name, data = event.get("event"), event.get("data")
        if isinstance(name, str):
            self._callback(name, data if isinstance(data, dict) else {})
        return False


def _error(reason: Reason, path: Path, what: str) -> VmferryError:
    return VmferryError(reason, f"QEMU's monitor {path} {what}.", REMEDY)
