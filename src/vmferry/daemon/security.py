"""The daemon's own security: its identity, the entrances of its ports, and the gates before their calls."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping

import grpc

from vmferry.daemon.config import Config
from vmferry.daemon.instance import HostUnfit
from vmferry.model.names import Address
from vmferry.ops.state import SecurityView
from vmferry.security.accept import Entrance
from vmferry.security.audit import AuditLog
from vmferry.security.caller import Caller
from vmferry.security.credentials import CredentialsError
from vmferry.security.gate import Context, Gate, Records, Rule
from vmferry.security.identity import Identity
from vmferry.security.refusal import Refusals
from vmferry.security.roles import changes

ANONYMOUS = Caller("tcp")
"""A caller on a plain port. There is one only where `[tls] mode` is "off"."""


class Security:
    """Owner of the identity and of the entrances."""

    def __init__(self, config: Config) -> None:
        """Raises: HostUnfit, a file of [tls] cannot be used."""
        self._config = config
        self.refusals = Refusals()
        self.identity = _identity(config)
        self._audit = AuditLog(config.state_dir / "audit.log")
        self._api = Entrance("api", config.runtime_dir / "api.grpc", self.refusals)
        self._peer = Entrance("peer", config.runtime_dir / "peer.grpc", self.refusals)
        records = Records(self._audit, self.refusals)
        self.api_gate = Gate("api", self._api_caller, Rule(self._api_problem, changes), records)
        self.peer_gate = Gate("peer", self._peer_caller, Rule(self._peer_problem, _changes_a_host), records)

    def bind_api(self, server: grpc.aio.Server) -> int:
        """Lets the API's server listen; returns its port. Raises: OSError, RuntimeError."""
        if self._config.api_socket is not None or self.identity is not None:
            server.add_insecure_port(f"unix:{self._config.runtime_dir / 'api.grpc'}")
        if self._config.api_socket is not None:
            self._api.bind_unix(self._config.api_socket, 0o666)
        return self._bind(server, self._api, self._config.api)

    def bind_peer(self, server: grpc.aio.Server) -> int:
        """Lets the peers' server listen; returns its port. Raises: OSError, RuntimeError."""
        if self.identity is not None:
            server.add_insecure_port(f"unix:{self._config.runtime_dir / 'peer.grpc'}")
        return self._bind(server, self._peer, self._config.peer)

    def _bind(self, server: grpc.aio.Server, entrance: Entrance, address: Address) -> int:
        if self.identity is None:
            return server.add_insecure_port(str(address))
        return entrance.bind_tls(address, self.identity)

    def services(self) -> Mapping[str, Coroutine[object, object, None]]:
        """The tasks that run as long as the daemon."""
        services: dict[str, Coroutine[object, object, None]] = {
            "api-entrance": self._api.run(),
            "peer-entrance": self._peer.run(),
        }
        if self.identity is not None:
            services["identity"] = self.identity.run()
        return services

    def close(self) -> None:
        self._api.close()
        self._peer.close()
        self._audit.close()

    def view(self) -> SecurityView:
        """The figures for the metrics."""
        left = self.identity.days_left() if self.identity is not None else None
        return SecurityView(certificate_days_left=left, refusals=self.refusals.counts())

    def source_of(self, context: Context) -> str | None:
        """The host that calls the peer port. None: callers have no certificates here."""
        if self.identity is None:
            return None
        caller = self._peer.caller(context.peer())
        return (caller.host if caller else None) or ""

    def _api_caller(self, grpc_peer: str) -> Caller | None:
        return self._api.caller(grpc_peer) or self._anonymous(grpc_peer)

    def _peer_caller(self, grpc_peer: str) -> Caller | None:
        return self._peer.caller(grpc_peer) or self._anonymous(grpc_peer)

    def _anonymous(self, grpc_peer: str) -> Caller | None:
        plain = self.identity is None and grpc_peer.startswith(("ipv4:", "ipv6:"))
        return ANONYMOUS if plain else None

    def _api_problem(self, caller: Caller | None, method: str) -> str | None:
        return None if caller is ANONYMOUS else self._config.access.problem(caller, method)

    def _peer_problem(self, caller: Caller | None, method: str) -> str | None:
        if caller is ANONYMOUS or (caller is not None and caller.host is not None):
            return None
        who, domain = caller or "a connection without a caller", self._config.tls.domain
        return f"{who} is no host of {domain}, and {method} is for hosts"


def _changes_a_host(method: str) -> bool:
    return not method.endswith(("/GetOutcome", "/WatchIncoming", "/Hello", "/ExchangeFacts"))


def _identity(config: Config) -> Identity | None:
    if config.tls.files is None:
        return None
    try:
        return Identity(config.tls.files, config.tls.domain, config.host)
    except CredentialsError as error:
        raise HostUnfit(f"tls.{error}") from error
