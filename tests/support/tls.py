"""Certificates for tests: an authority for the session, and material that is wrong in one way."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

from vmferry.security.credentials import CredentialFiles, Credentials
from vmferry.security.identity import Identity
from vmferry.security.names import host_id
from vmferry.security.pki import Authority

DOMAIN = "test.vmferry"
LOOPBACK = ("127.0.0.1", "localhost")
USER = f"spiffe://{DOMAIN}/vmferry/user"


class Unchecked(Identity):
    """The identity of a caller that does not look at its own certificate before it shows it."""

    def _check_validity(self, credentials: Credentials) -> None:
        """It shows a certificate of yesterday as well."""


def host_files(authority: Authority, name: str, addresses: Sequence[str] = LOOPBACK) -> CredentialFiles:
    """A certificate of the host `name`. The same file is not issued twice."""
    files = authority.files(name)
    return files if files.cert.exists() else authority.issue(name, host_id(DOMAIN, name), addresses)


def user_files(authority: Authority, name: str) -> CredentialFiles:
    files = authority.files(f"user-{name}")
    return files if files.cert.exists() else authority.issue(f"user-{name}", f"{USER}/{name}")


def expired_files(authority: Authority, name: str) -> CredentialFiles:
    begins, lasts = -dt.timedelta(days=2), -dt.timedelta(days=1)
    return authority.issue(f"expired-{name}", host_id(DOMAIN, name), LOOPBACK, begins, lasts)


def early_files(authority: Authority, name: str) -> CredentialFiles:
    return authority.issue(f"early-{name}", host_id(DOMAIN, name), LOOPBACK, dt.timedelta(days=1), dt.timedelta(days=2))


def section(files: CredentialFiles) -> dict[str, str]:
    """The values of `[tls]`."""
    return {
        "cert": str(files.cert),
        "key": str(files.key),
        "ca": str(files.ca),
        "crl": str(files.crl),
        "domain": DOMAIN,
    }


def environment(files: CredentialFiles) -> dict[str, str]:
    """The variables that name the certificate to a client of the API."""
    named = {"CERT": files.cert, "KEY": files.key, "CA": files.ca, "CRL": files.crl or Path()}
    return {f"VMFERRY_{key}": str(path) for key, path in named.items()} | {"VMFERRY_DOMAIN": DOMAIN}
