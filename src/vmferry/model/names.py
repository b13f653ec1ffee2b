"""The rules for names and addresses that people choose. Each rule is a pattern for a whole text."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

MIGRATION_ID = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
VM_NAME = r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}"
NONCE = r"[0-9a-f]{32}"
"""The random name of one job: 128 bits."""
HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""The name of a daemon's host, which need not be a DNS name."""

SOCKET_PATH_LIMIT = 107
"""Longest path of a unix socket, bytes: `sun_path` of 108 with its NUL (unix(7))."""

_DNS_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?"


def is_migration_id(text: str) -> bool:
    return re.fullmatch(MIGRATION_ID, text) is not None


def is_vm_name(text: str) -> bool:
    return re.fullmatch(VM_NAME, text) is not None


def is_nonce(text: str) -> bool:
    return re.fullmatch(NONCE, text) is not None


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address: a host name or an IP address, and a port. Port 0 stands for any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, least_port: int = 0) -> Address | None:
    """Reads `host:port` or `[v6]:port`; None for any other text. Names are not resolved."""
    host, separator, port = text.rpartition(":")
    if not separator or not re.fullmatch(r"[0-9]{1,5}", port) or not least_port <= int(port) <= 65535:
        return None
    if host.startswith("[") and host.endswith("]"):
        return Address(host[1:-1], int(port)) if is_ip(host[1:-1]) else None
    if re.fullmatch(_DNS_NAME, host):
        return Address(host, int(port))
    return None


def is_ip(text: str) -> bool:
    """Whether the text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
