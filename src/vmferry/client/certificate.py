"""The certificate of a user or program that calls the API, named by the environment.

| variable | names |
|---|---|
| `VMFERRY_CERT`, `VMFERRY_KEY` | the PEM files of the caller's certificate and its key |
| `VMFERRY_CA` | the PEM file of the daemons' authorities |
| `VMFERRY_CRL` | the PEM file of revoked certificates; optional |
| `VMFERRY_DOMAIN` | the SPIFFE trust domain of the hosts |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vmferry.client.refusal import UnreachableError
from vmferry.model.names import parse_address
from vmferry.security.credentials import CredentialFiles, CredentialsError
from vmferry.security.dial import Tunnel
from vmferry.security.identity import Identity
from vmferry.security.names import DEFAULT_DOMAIN

VARIABLES = {"cert": "VMFERRY_CERT", "key": "VMFERRY_KEY", "ca": "VMFERRY_CA", "crl": "VMFERRY_CRL"}
DOMAIN = "VMFERRY_DOMAIN"
REMEDY = "`vmferry pki issue` makes a certificate; the variables VMFERRY_CERT, VMFERRY_KEY and VMFERRY_CA name it."


def open_tunnel(address: str, timeout_s: float, environment: Mapping[str, str]) -> Tunnel | None:
    """A way to the daemon by TLS. None: the environment names no certificate.

    Raises: UnreachableError, the certificate cannot be used.
    """
    named = {key: environment[name] for key, name in VARIABLES.items() if environment.get(name)}
    there = parse_address(address)
    if not named or there is None:
        return None
    missing = [VARIABLES[key] for key in ("cert", "key", "ca") if key not in named]
    if missing:
        raise UnreachableError("CERTIFICATE", f"{missing[0]} is not set, and {VARIABLES[next(iter(named))]} is", REMEDY)
    crl = Path(named["crl"]) if "crl" in named else None
    files = CredentialFiles(Path(named["cert"]), Path(named["key"]), Path(named["ca"]), crl)
    try:
        identity = Identity(files, environment.get(DOMAIN, DEFAULT_DOMAIN))
    except CredentialsError as error:
        raise UnreachableError("CERTIFICATE", f"{VARIABLES[error.field]}: {error.message}", REMEDY) from error
    return Tunnel("api", there, identity, timeout_s)
