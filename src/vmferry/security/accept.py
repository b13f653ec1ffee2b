"""The way into a gRPC server: TLS and unix connections are accepted here, named, and handed to the server's own socket.

```
 TLS 1.3 ──▶ handshake, names ──▶ Caller ─┐
 unix ─────▶ SO_PEERCRED ───────▶ Caller ─┴▶ connection to the server's socket, from an address for this caller
```
grpc has no revocation list, no minimum version and no cause of a failed handshake in Python; this has. The server's
socket lies in the daemon's own directory. A connection to it that did not come from here has no caller.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog

from vmferry.model.names import Address
from vmferry.security.caller import Caller, PeerProcess
from vmferry.security.forward import Half, join
from vmferry.security.identity import Identity
from vmferry.security.names import names_of
from vmferry.security.refusal import Cause, Refusals, cause_of, words_of

log = structlog.stdlib.get_logger()

REFUSED = "connection.refused"

HANDSHAKE_S = 10.0
BACKLOG = 128
PAUSE_S = 0.05
"""After an accept that failed, e.g. without a free descriptor."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The most connections of one port. More are refused at once, and counted."""

    total: int = 256
    of_one_address: int = 64
    """Of one unix user, on a unix socket."""
    handshakes: int = 64
    """Connections that have not said who they are."""


class Entrance:
    """Owner of the connections of one port."""

    def __init__(
        self,
        port: str,
        server_socket: Path,
        refusals: Refusals,
        limits: ConnectionLimits = ConnectionLimits(),
    ) -> None:
        self._port = port
        self._server_socket = server_socket
        self._refusals = refusals
        self._limits = limits
        self._callers: dict[str, Caller] = {}
        self._halves: set[Half] = set()
        self._of_address: Counter[str] = Counter()
        self._handshakes = 0
        self._listeners: list[tuple[socket.socket, Identity | None]] = []

    def bind_tls(self, address: Address, identity: Identity) -> int:
        """Takes the address; returns the port. Raises: OSError."""
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, at = found[0]
        listener = socket.create_server(at[:2], family=family, backlog=BACKLOG)
        self._add(listener, identity)
        bound: int = listener.getsockname()[1]
        return bound

    def bind_unix(self, path: Path, mode: int) -> None:
        """Takes the path. A socket that nobody listens on any more is replaced. Raises: OSError."""
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(BACKLOG)
        self._add(listener, None)

    def _add(self, listener: socket.socket, identity: Identity | None) -> None:
        listener.setblocking(False)
        self._listeners.append((listener, identity))

    def caller(self, grpc_peer: str) -> Caller | None:
        """The caller by `ServicerContext.peer()`. None: the connection did not come by this way."""
        return self._callers.get(grpc_peer)

    async def run(self) -> NoReturn:
        """Accepts connections until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for listener, identity in self._listeners:
                group.create_task(self._accept(listener, identity, group), name=f"{self._port}-accept")
            await asyncio.Event().wait()
        raise AssertionError("the listeners end by cancellation alone")

    def close(self) -> None:
        """Closes the listeners and every connection."""
        for listener, _ in self._listeners:
            listener.close()
        for half in tuple(self._halves):
            half.close()

    async def _accept(self, listener: socket.socket, identity: Identity | None, group: asyncio.TaskGroup) -> NoReturn:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, at = await loop.sock_accept(listener)
            except OSError as error:
                log.warning(REFUSED, port=self._port, error=str(error))
                await asyncio.sleep(PAUSE_S)
                continue
            connection.setblocking(False)
            host = at[0] if isinstance(at, tuple) else f"uid {PeerProcess.of(connection).uid}"
            where = str(Address(host, at[1])) if isinstance(at, tuple) else "unix"
            cause = self._excess(host)
            if cause is not None:
                self._refuse(cause, where, "the limit of connections is reached")
                connection.close()
                continue
            self._of_address[host] += 1
            group.create_task(self._serve(connection, host, where, identity), name=f"{self._port}-connection")

    def _excess(self, host: str) -> Cause | None:
        of_address = self._of_address[host] >= self._limits.of_one_address
        full = self._of_address.total() >= self._limits.total or self._handshakes >= self._limits.handshakes
        return Cause.TOO_MANY if full or of_address else None

    async def _serve(self, connection: socket.socket, host: str, where: str, identity: Identity | None) -> None:
        ended = asyncio.Event()
        name = f"vmferry-{self._port}-{secrets.token_hex(8)}"
        peer = f"unix-abstract:{name}"
        try:
            outer = await self._outer(connection, where, identity, ended)
            if outer is None:
                return
            half, caller = outer
            self._halves.add(half)
            self._callers[peer] = caller
            try:
                inner = await self._inner(name, ended)
                join(half, inner)
                await ended.wait()
                inner.close()
            except OSError as error:
                log.warning(REFUSED, port=self._port, peer=where, error=f"the server does not answer: {error}")
            finally:
                half.close()
                self._halves.discard(half)
                del self._callers[peer]
        finally:
            connection.close()
            self._of_address[host] -= 1
            if not self._of_address[host]:
                del self._of_address[host]

    async def _outer(
        self, connection: socket.socket, where: str, identity: Identity | None, ended: asyncio.Event
    ) -> tuple[Half, Caller] | None:
        """The accepted connection and its caller. None: it was refused, or went away."""
        loop = asyncio.get_running_loop()
        half = Half(lambda _error: ended.set())
        if identity is None:
            process = PeerProcess.of(connection)
            await loop.connect_accepted_socket(lambda: half, connection)
            return half, Caller(where, user=process.user)
        self._handshakes += 1
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: half, connection, ssl=identity.server_context(), ssl_handshake_timeout=HANDSHAKE_S
            )
        except OSError as error:
            cause = cause_of(error)
            if cause is not None:
                self._refuse(cause, where, words_of(error))
            return None
        finally:
            self._handshakes -= 1
        names = names_of(transport.get_extra_info("peercert") or {})
        return half, Caller(where, names=names, host=names.host(identity.domain))

    async def _inner(self, name: str, ended: asyncio.Event) -> Half:
        """A connection to the server, from an address of this name."""
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.bind(f"\0{name}")
            await loop.sock_connect(connection, str(self._server_socket))
            half = Half(lambda _error: ended.set())
            await loop.create_connection(lambda: half, sock=connection)
        except BaseException:
            connection.close()
            raise
        return half

    def _refuse(self, cause: Cause, where: str, error: str) -> None:
        if self._refusals.note(self._port, cause):
            log.warning(REFUSED, port=self._port, peer=where, cause=cause.value, error=error)
