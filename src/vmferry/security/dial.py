"""The way to a gRPC server of another host: a channel connects to a socket of this process, which forwards by TLS.

The certificate at the other end must be of a host of the domain, and for the address that was dialled. After the first
connection it must be of the same host. No byte of a call goes to any other.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from contextlib import suppress

import structlog

from vmferry.model.names import Address
from vmferry.security.caller import PeerProcess
from vmferry.security.forward import Half, join
from vmferry.security.identity import Identity
from vmferry.security.names import names_of
from vmferry.security.refusal import Cause, Refusals, cause_of, words_of

log = structlog.stdlib.get_logger()

DIAL_REFUSED = "connection.dial_refused"

CLOSED = "it closed the connection behind the handshake; its log has the cause, e.g. that it refuses this certificate"


class DialError(Exception):
    """The other end is not the one that was dialled, or cannot be reached."""


class Tunnel:
    """Owner of the connections of one client to one address. Close it after its channel."""

    def __init__(
        self, port: str, address: Address, identity: Identity, connect_s: float, refusals: Refusals | None = None
    ) -> None:
        """Call it from the event loop: the channel may connect at once."""
        self.failure = ""
        """The reason that the newest connection failed; empty after one that is up."""
        self.host = ""
        """The host at the other end, once a connection was up."""
        self._port = port
        self._address = address
        self._identity = identity
        self._connect_s = connect_s
        self._refusals = refusals or Refusals()
        name = f"vmferry-dial-{secrets.token_hex(16)}"
        self.target = f"unix-abstract:{name}"
        """The address for the channel."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        self._tasks: set[asyncio.Task[None]] = set()
        self._halves: set[Half] = set()
        self._start(self._accept(), f"dial {address}")

    async def close(self) -> None:
        self._listener.close()
        for half in tuple(self._halves):
            half.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: object, name: str) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with suppress(OSError):
                connection, _ = await loop.sock_accept(self._listener)
                # Anybody may connect to an abstract socket.
                if PeerProcess.of(connection).pid != os.getpid():
                    connection.close()
                    continue
                self._start(self._forward(connection), f"dial {self._address}")

    async def _forward(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        near = Half(lambda _error: ended.set())
        connection.setblocking(False)
        await loop.create_connection(lambda: near, sock=connection)
        self._halves.add(near)
        try:
            far = await self._dial(ended)
            self.failure = ""
            join(near, far)
            self._halves.add(far)
            await ended.wait()
            far.close()
            self._halves.discard(far)
        except DialError as error:
            self.failure = str(error)
        finally:
            near.close()
            self._halves.discard(near)

    async def _dial(self, ended: asyncio.Event) -> Half:
        loop = asyncio.get_running_loop()

        def lost(error: Exception | None) -> None:
            if error is not None:
                self._note(error)
            elif not half.received and half.transport is not None and not half.closed_here:
                self.failure = CLOSED
            ended.set()

        half = Half(lost)
        at, context = self._address, self._identity.client_context()
        try:
            async with asyncio.timeout(self._connect_s):
                transport, _ = await loop.create_connection(
                    lambda: half, at.host, at.port, ssl=context, server_hostname=""
                )
        except OSError as error:  # TimeoutError is one of them.
            self._note(error)
            raise DialError(self.failure or f"no TLS connection within {self._connect_s:g} s") from error
        names = names_of(transport.get_extra_info("peercert") or {})
        host = names.host(self._identity.domain)
        problem = None
        if host is None:
            problem = f"its certificate is for {names}, and not for one host of {self._identity.domain}"
        elif not names.has_address(at.host):
            problem = f"its certificate is for {names}, and not for the address {at.host}"
        elif self.host and host != self.host:
            problem = f"its certificate is of the host {host}; the calls before went to {self.host}"
        if problem is not None or host is None:
            half.close()
            self._refusals.note(self._port, Cause.WRONG_NAME)
            log.warning(DIAL_REFUSED, port=self._port, peer=str(at), cause=Cause.WRONG_NAME.value, error=problem)
            raise DialError(problem or "")
        self.host = host
        return half

    def _note(self, error: Exception) -> None:
        """Keeps the reason of a failed connection, for the error of the call."""
        cause = cause_of(error)
        words = words_of(error)
        if cause is Cause.REFUSED_BY_PEER:
            words = f"it refuses this host's certificate ({words})"
        elif cause is Cause.NOT_TLS:
            words = f"no TLS answers there ({words})"
        self.failure = words
        if cause is not None:
            self._refusals.note(self._port, cause)
            log.warning(DIAL_REFUSED, port=self._port, peer=str(self._address), cause=cause.value, error=words)
