"""The identity of this host or user, and its TLS contexts: made anew when the files change.

TLS 1.3 only, and both ends show a certificate. Connections that are open keep the context that they began with.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import structlog

from vmferry.security.credentials import (
    CredentialFiles,
    Credentials,
    CredentialsError,
    load,
    validity_problem,
)
from vmferry.security.names import host_id

log = structlog.stdlib.get_logger()

RENEWED = "tls.renewed"
NOT_RENEWED = "tls.not_renewed"
EXPIRES = "tls.expires"

LOOK_S = 5.0
"""The files are looked at this often."""
SOON_DAYS = 7.0
"""A certificate with less time is logged with each look of a new day."""
ALPN = "h2"


class Identity:
    """Owner of the credentials in use."""

    def __init__(self, files: CredentialFiles, domain: str, host: str | None = None) -> None:
        """`host`: the certificate must name it. None: a user's certificate, of any name.

        Raises:
            CredentialsError: the files cannot be used.
        """
        self.domain = domain
        self._files = files
        self._host = host
        self._signature = files.signature()
        self._refused: object = None
        self.credentials = self._load()
        self._server, self._client = _contexts(self.credentials)

    def server_context(self) -> ssl.SSLContext:
        """For a connection that was accepted now."""
        self.look()
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """For a connection that is made now."""
        self.look()
        return self._client

    def days_left(self) -> float:
        return self.credentials.days_left(time.time())

    def look(self) -> None:
        """Reads changed files. If they cannot be used, the credentials in use stay, and the log says why, once."""
        signature = self._files.signature()
        if signature in (self._signature, self._refused):
            return
        try:
            credentials = self._load()
            contexts = _contexts(credentials)
        except CredentialsError as error:
            self._refused = signature
            log.error(NOT_RENEWED, error=str(error))  # noqa: TRY400 - a file, not a defect
            return
        self._signature, self.credentials = signature, credentials
        self._server, self._client = contexts
        log.info(RENEWED, names=str(credentials.names), days_left=round(self.days_left(), 1))

    async def run(self) -> NoReturn:
        """Looks at the files for ever, and logs a certificate that expires soon, once a day."""
        warned_day = -1
        while True:
            self.look()
            left, day = self.days_left(), int(time.time() // 86_400)
            if left < SOON_DAYS and day != warned_day:
                log.warning(EXPIRES, days_left=round(left, 2))
                warned_day = day
            await asyncio.sleep(LOOK_S)

    def _load(self) -> Credentials:
        credentials = load(self._files)
        self._check_validity(credentials)
        if self._host is not None and credentials.names.host(self.domain) != self._host:
            raise CredentialsError(
                "cert",
                f"{self._files.cert} is for {credentials.names}; this host needs the one URI "
                f"{host_id(self.domain, self._host)}. Issue it with `vmferry pki issue`, or correct the configuration.",
            )
        return credentials

    def _check_validity(self, credentials: Credentials) -> None:
        problem = validity_problem(credentials, time.time())
        if problem is not None:
            raise CredentialsError("cert", f"{self._files.cert} {problem}.")


def _contexts(credentials: Credentials) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server and of a client."""
    made = tuple(_context(side, credentials) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
    return made[0], made[1]


def _context(side: ssl._SSLMethod, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    context.check_hostname = False  # The names are compared after the handshake: the URI is one of them.
    context.verify_mode = ssl.CERT_REQUIRED
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    try:
        with _as_file(credentials.chain_pem) as chain, _as_file(credentials.key_pem) as key:
            context.load_cert_chain(chain, key)
        with _as_file(credentials.ca_pem + b"\n" + credentials.crl_pem) as trusted:
            context.load_verify_locations(trusted)
    except (ssl.SSLError, OSError) as error:
        raise CredentialsError("cert", f"OpenSSL refuses the files: {error}.") from error
    if credentials.crl_pem:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


@contextmanager
def _as_file(contents: bytes) -> Iterator[str]:
    """A path with these contents: `ssl` reads keys and revocation lists from paths alone. Nothing comes on a disk."""
    fd = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, contents, 0)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
