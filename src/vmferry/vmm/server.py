"""The control socket: accepts VMMs and keeps their sessions. A faulty VMM disturbs no other.

`serve()` owns every task: one that accepts, and two for each connection. One of these reads, the other records memory
errors.

A VM may be connected twice, for a move within the host, but only once in each slot:

| slot | states |
|---|---|
| `running` | running |
| `stopped` | stopped: no vCPU runs, the memory is kept |
| `incoming` | incoming, prepared, loaded |
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.model.names import SOCKET_PATH_LIMIT
from vmferry.model.vmm import SLOT_OF_STATE, VmmIdentity
from vmferry.ports import Vmm, Vmms
from vmferry.vmm import protocol
from vmferry.vmm.process import peer_of, process_named
from vmferry.vmm.protocol import FrameDecoder, FromVmm, ProtocolError
from vmferry.vmm.session import RecordErrors, TellReset, VmmDeadlines, VmmSession

log = structlog.get_logger()

CONNECTED = "vmm.connected"
DISCONNECTED = "vmm.disconnected"
REFUSED = "vmm.refused"
CRASHED = "vmm.connection_crashed"
ACCEPT_FAILED = "vmm.accept_failed"

READ_BYTES = 256 * 1024
BACKLOG = 128
ACCEPT_RETRY_S = 1.0
CLOSE_GRACE_S = 2.0
"""Time for the VMM to read the last frame before the connection is dropped."""
SOCKET_MODE = 0o600


def _ignore(_vmm: VmmSession) -> None:
    pass


async def _ignore_reset(_vm: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class VmmCallbacks:
    """The callbacks of the wiring.

    `on_memory_errors` returns once the errors are durable, and may be called again for the same errors.
    `on_guest_reset` gets the VM's name. The other two must not block. The event loop calls `on_connected` after
    `welcome` was sent, `on_disconnected` after the pending requests failed.
    """

    on_memory_errors: RecordErrors
    on_connected: Callable[[VmmSession], None] = _ignore
    on_disconnected: Callable[[VmmSession], None] = _ignore
    on_guest_reset: TellReset = _ignore_reset


class VmmServer:
    """The server of the control socket: `ports.Vmms`."""

    def __init__(
        self,
        path: Path,
        callbacks: VmmCallbacks,
        now_us: Callable[[], int],
        deadlines: VmmDeadlines | None = None,
    ) -> None:
        self._path = path
        self._callbacks = callbacks
        self._now_us = now_us
        self._deadlines = deadlines or VmmDeadlines()
        self._sessions: list[VmmSession] = []
        self._others: Vmms | None = None
        self.listening = asyncio.Event()
        """Set once VMMs can connect."""

    def share_names_with(self, others: Vmms) -> None:
        """No VMM may have the name of one of these, in the same slot."""
        self._others = others

    def running(self, vm: str) -> VmmSession | None:
        """The running VMM, else the stopped one."""
        return self._in_slot(vm, "running") or self._in_slot(vm, "stopped")

    def incoming(self, vm: str) -> VmmSession | None:
        return self._in_slot(vm, "incoming")

    def all(self) -> Sequence[VmmSession]:
        return tuple(self._sessions)

    async def serve(self) -> None:
        """Serves until cancelled. Raises: VmferryError if the socket cannot be made."""
        listener = listen(self._path)
        try:
            async with asyncio.TaskGroup() as tasks:
                self.listening.set()
                await self._accept(listener, tasks)
        finally:
            self.listening.clear()
            listener.close()
            with suppress(FileNotFoundError):
                self._path.unlink()

    async def _accept(self, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # EMFILE, ENFILE, ENOMEM, ECONNABORTED: the next accept may succeed.
                log.warning(ACCEPT_FAILED, error=str(error))
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            tasks.create_task(self._connection(connection), name="vmm.connection")

    async def _connection(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
        except OSError:
            connection.close()
            return
        try:
            await self._conversation(reader, writer)
        except ProtocolError as error:
            log.warning(REFUSED, code=error.code, field=error.field, error=error.message)
            with suppress(OSError):
                writer.write(protocol.encode(protocol.ErrorFrame(error.code, error.field, error.message)))
        except OSError as error:
            log.info(REFUSED, error=str(error))
        except Exception:  # A defect with one VMM must not end the connections of others.
            log.exception(CRASHED)
        finally:
            writer.close()
            # A VMM that no longer reads must not keep the descriptor.
            asyncio.get_running_loop().call_later(CLOSE_GRACE_S, writer.transport.abort)

    async def _conversation(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        messages = _Messages(reader)
        try:
            async with asyncio.timeout(self._deadlines.hello_s):
                hello = await messages.next()
        except TimeoutError as error:
            raise ProtocolError("type", f"no hello within {self._deadlines.hello_s:g} s") from error
        if hello is None:
            return
        session = self._welcome(hello, writer)
        reason, why = Reason.VMM_GONE, "was disconnected by the daemon, which stops"
        try:
            why = await self._session(session, messages)
        except ProtocolError as error:
            reason, why = Reason.VMM_PROTOCOL, f"sent a malformed message ({error})"
            raise
        except OSError as error:
            why = f"broke the connection ({error})"
            raise
        finally:
            self._sessions.remove(session)
            session.end(reason, why)
            log.info(DISCONNECTED, vm=session.identity.vm, pid=session.identity.pid, why=why)
            self._callbacks.on_disconnected(session)

    def _welcome(self, hello: FromVmm, writer: asyncio.StreamWriter) -> VmmSession:
        if not isinstance(hello, protocol.Hello):
            raise ProtocolError("type", "the first message must be hello")
        identity = protocol.identity_of(hello)
        connection = writer.get_extra_info("socket")
        identity = replace(identity, pid=process_named(peer_of(connection), identity.pid))
        rival = self._rival(identity)
        if rival is not None:
            message = (
                f"a VMM of {identity.vm} that is {rival.identity.state} is connected already (pid {rival.identity.pid})"
            )
            raise ProtocolError("vm", message, protocol.CODE_BAD_STATE)
        session = VmmSession(identity, writer, self._deadlines, self._now_us)
        session.send(protocol.Welcome())
        self._sessions.append(session)
        log.info(CONNECTED, vm=identity.vm, pid=identity.pid, state=identity.state)
        self._callbacks.on_connected(session)
        return session

    async def _session(self, session: VmmSession, messages: _Messages) -> str:
        """Serves until the VMM closes the connection. Returns the kind of end."""
        recorder = asyncio.create_task(
            session.record_errors(self._callbacks.on_memory_errors, self._callbacks.on_guest_reset),
            name=f"vmm.errors.{session.identity.vm}",
        )
        try:
            while (message := await messages.next()) is not None:
                await session.take(message)
            return "closed the connection"
        finally:
            recorder.cancel()
            await asyncio.gather(recorder, return_exceptions=True)

    def _rival(self, identity: VmmIdentity) -> Vmm | None:
        slot = SLOT_OF_STATE[identity.state]
        everybody = [*self._sessions, *(self._others.all() if self._others else ())]
        of_name = [one for one in everybody if one.identity.vm == identity.vm]
        return next((one for one in of_name if SLOT_OF_STATE.get(one.identity.state) == slot), None)

    def _in_slot(self, vm: str, slot: str) -> VmmSession | None:
        for session in self._sessions:
            if session.identity.vm == vm and SLOT_OF_STATE.get(session.identity.state) == slot:
                return session
        return None


class _Messages:
    """The messages of a connection, one at a time."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._decoder = FrameDecoder()
        self._bodies = self._decoder.feed(b"")

    async def next(self) -> FromVmm | None:
        """The next message. None: the VMM closed the connection between two frames. Raises: ProtocolError, OSError."""
        while True:
            for body in self._bodies:
                return protocol.decode_from_vmm(body)
            data = await self._reader.read(READ_BYTES)
            if not data:
                if self._decoder.in_frame:
                    raise ConnectionResetError("closed in the middle of a frame")
                return None
            self._bodies = self._decoder.feed(data)


def listen(path: Path) -> socket.socket:
    """A listening unix socket at `path`, mode 0600. It replaces a socket that no process serves any more.

    Raises: VmferryError INVALID_ARGUMENT, naming the fault of the path.
    """
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise _unusable(path, f"is longer than {SOCKET_PATH_LIMIT} bytes", "Choose a shorter path.")
    if not path.parent.is_dir():
        raise _unusable(path, f"lies in {path.parent}, which is no directory", "Create it, for the daemon's user only.")
    if stat.S_IMODE(path.parent.stat().st_mode) & stat.S_IWOTH and not path.parent.stat().st_mode & stat.S_ISVTX:
        raise _unusable(path, f"lies in {path.parent}, which anyone may write", f"chmod o-w {path.parent}")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    mask = os.umask(0o777 & ~SOCKET_MODE)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise _unusable(path, f"cannot be made ({error})", "Check the directory's permissions.") from error
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _unusable(path, "exists and is no socket", "Remove it or choose another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # The backlog is full, so a process listens.
    raise _unusable(path, "is served by another process", "Stop the other vmferryd, or give this one another path.")


def _unusable(path: Path, what: str, remedy: str) -> VmferryError:
    return VmferryError(Reason.INVALID_ARGUMENT, f"The VMM socket {path} {what}.", remedy)
