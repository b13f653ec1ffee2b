"""The sections `[tls]` and `[access]` of the configuration."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from vmferry.daemon.toml_table import Table
from vmferry.model.names import Address, is_ip
from vmferry.security.credentials import CredentialFiles
from vmferry.security.names import DEFAULT_DOMAIN, TRUST_DOMAIN
from vmferry.security.roles import PATTERN, Access, Role

MODES = ("required", "off")
DEFAULT_ADMIN = ("user:root",)


@dataclass(frozen=True, slots=True)
class Tls:
    """The identity of this host."""

    files: CredentialFiles | None
    """None: connections are plain."""
    domain: str
    """The SPIFFE trust domain."""


def parse_tls(table: Table, listeners: Mapping[str, str]) -> Tls:
    """Reads `[tls]`. `listeners` are the hosts of all listening addresses by key: TLS is the default unless each is
    loopback.
    """
    exposed = [key for key, host in listeners.items() if not is_loopback(host)]
    cert, key, ca = (table.optional_path(name) for name in ("cert", "key", "ca"))
    crl = table.optional_path("crl")
    default = "required" if exposed or cert is not None else "off"
    mode = table.choice("mode", default, MODES)
    domain = table.text("domain", DEFAULT_DOMAIN, TRUST_DOMAIN, "a SPIFFE trust domain like prod.example.org")
    if mode == "off":
        for name, path in (("cert", cert), ("key", key), ("ca", ca), ("crl", crl)):
            if path is not None:
                table.problem(name, str(path), 'absent while mode is "off"')
        table.finish()
        return Tls(None, domain)
    why = f" ({exposed[0]} is not loopback)" if exposed else ""
    for name, path in (("cert", cert), ("key", key), ("ca", ca)):
        if path is None:
            table.problem(
                name,
                "absent",
                f'a path to PEM{why}: `vmferry pki` makes a small authority; or set mode = "off", where only hosts and '
                "operators reach the ports",
            )
    table.finish()
    if cert is None or key is None or ca is None:
        return Tls(None, domain)
    return Tls(CredentialFiles(cert, key, ca, crl), domain)


def parse_access(table: Table) -> Access:
    """Reads `[access]`: the subjects of each role. Who has none may call nothing."""
    subjects = {
        role: table.texts(
            role.value,
            DEFAULT_ADMIN if role is Role.ADMIN else (),
            PATTERN,
            'a list like ["spiffe://DOMAIN/PATH/*", "user:NAME"]',
        )
        for role in Role
    }
    table.finish()
    return Access(subjects)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    return ipaddress.ip_address(host).is_loopback if is_ip(host) else host == "localhost"


def listeners(api: Address, peer: Address, ops: Address, pages_ip: str) -> dict[str, str]:
    """The hosts of the listening addresses, by key."""
    return {"api.listen": api.host, "peer.listen": peer.host, "ops.listen": ops.host, "pages.ip": pages_ip}
