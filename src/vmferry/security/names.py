"""Names in certificates: the SPIFFE ID of a host, and the addresses that a certificate is for. Pure.

A host has the SPIFFE ID `spiffe://DOMAIN/vmferry/host/NAME` as its one URI in the subject alternative name (SPIFFE
X509-SVID, section 4). Its DNS names and IP addresses are those of jobs for it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vmferry.model.names import HOST_NAME, is_ip

TRUST_DOMAIN = r"[a-z0-9]([a-z0-9._-]{0,253}[a-z0-9])?"
"""SPIFFE ID, section 2.1: lower case, and no port."""
DEFAULT_DOMAIN = "vmferry.internal"

_ID = re.compile(rf"spiffe://(?P<domain>{TRUST_DOMAIN})/vmferry/host/(?P<name>{HOST_NAME})")


def host_id(domain: str, name: str) -> str:
    """The SPIFFE ID of a host."""
    return f"spiffe://{domain}/vmferry/host/{name}"


@dataclass(frozen=True, slots=True)
class CertificateNames:
    """The subject alternative names of a verified certificate."""

    uris: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()

    def host(self, domain: str) -> str | None:
        """The host of this domain. None: the one URI is another, or there is not exactly one."""
        if len(self.uris) != 1:
            return None
        match = _ID.fullmatch(self.uris[0])
        return match["name"] if match and match["domain"] == domain else None

    def has_address(self, host: str) -> bool:
        """Whether the certificate is for this IP address or DNS name. Wildcards do not count."""
        if is_ip(host):
            wanted = ipaddress.ip_address(host)
            return any(is_ip(one) and ipaddress.ip_address(one) == wanted for one in self.ips)
        return host.lower() in (one.lower() for one in self.dns)

    def __str__(self) -> str:
        return ", ".join((*self.uris, *self.dns, *self.ips)) or "no names"


def names_of(certificate: Mapping[str, Any]) -> CertificateNames:
    """The names in the form of `ssl.SSLSocket.getpeercert`."""
    names: Iterable[tuple[str, str]] = certificate.get("subjectAltName", ())
    found: dict[str, list[str]] = {"URI": [], "DNS": [], "IP Address": []}
    for kind, value in names:
        found.setdefault(kind, []).append(value)
    return CertificateNames(tuple(found["URI"]), tuple(found["DNS"]), tuple(found["IP Address"]))
