"""The files of a host's identity: certificate, key, authorities, revocations. Read and checked as a whole."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from vmferry.security.names import CertificateNames

Signature: TypeAlias = tuple[tuple[int, int, int, int], ...]

PEM_LIMIT = 1 << 20
"""The most bytes of one file."""


class CredentialsError(Exception):
    """A file cannot be used. `field` is its key in the configuration; the message has cause and remedy."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """The paths of `[tls]`."""

    cert: Path
    """PEM: the certificate, then the intermediate authorities."""
    key: Path
    ca: Path
    """PEM: the authorities that peers may come from."""
    crl: Path | None = None
    """PEM: certificates that the authorities have revoked."""

    def signature(self) -> Signature:
        """Device, inode, size and change time of each file: another one means that the files have changed."""
        found: list[tuple[int, int, int, int]] = []
        for path in (self.cert, self.key, self.ca, self.crl):
            try:
                stat = path.stat() if path else None
            except OSError:
                stat = None
            found.append((stat.st_dev, stat.st_ino, stat.st_size, stat.st_ctime_ns) if stat else (0, 0, 0, 0))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The contents of the files, which fit each other."""

    chain_pem: bytes
    key_pem: bytes
    ca_pem: bytes
    crl_pem: bytes
    """Empty: nothing is checked for revocation."""
    names: CertificateNames
    not_before_s: float
    not_after_s: float
    """Unix time."""

    def __repr__(self) -> str:
        return f"Credentials({self.names})"

    def days_left(self, now_s: float) -> float:
        """Days until the certificate expires; negative: since then."""
        return (self.not_after_s - now_s) / 86_400


def load(files: CredentialFiles) -> Credentials:
    """Reads the files.

    Raises:
        CredentialsError: the first file that cannot be read, is no PEM, or does not fit the others.
    """
    chain_pem, ca_pem = _read("cert", files.cert), _read("ca", files.ca)
    key_pem = _key(files.key)
    crl_pem = _read("crl", files.crl) if files.crl else b""
    chain = _certificates("cert", files.cert, chain_pem)
    authorities = _certificates("ca", files.ca, ca_pem)
    if crl_pem:
        _revocations(files.crl or Path(), crl_pem, authorities)
    leaf, key = chain[0], _private_key(files.key, key_pem)
    if _spki(key.public_key()) != _spki(leaf.public_key()):
        raise CredentialsError(
            "key", f"{files.key} is the key of another certificate than {files.cert}. Issue both together."
        )
    if not any(_issued(chain[-1], authority) for authority in authorities):
        raise CredentialsError("cert", f"{files.cert} was not issued by an authority of {files.ca}.")
    return Credentials(
        chain_pem=chain_pem,
        key_pem=key_pem,
        ca_pem=ca_pem,
        crl_pem=crl_pem,
        names=_names(leaf),
        not_before_s=leaf.not_valid_before_utc.timestamp(),
        not_after_s=leaf.not_valid_after_utc.timestamp(),
    )


def validity_problem(credentials: Credentials, now_s: float) -> str | None:
    """The reason that peers refuse the certificate now."""
    if now_s >= credentials.not_after_s:
        return f"expired on {_day(credentials.not_after_s)}: issue another"
    if now_s < credentials.not_before_s:
        return f"is not valid before {_day(credentials.not_before_s)}: check this host's clock"
    return None


def _day(unix_s: float) -> str:
    return dt.datetime.fromtimestamp(unix_s, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(field: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            contents = file.read(PEM_LIMIT + 1)
    except OSError as error:
        raise CredentialsError(field, f"{path} cannot be read: {error.strerror}.") from error
    if len(contents) > PEM_LIMIT:
        raise CredentialsError(field, f"{path} has more than {PEM_LIMIT} bytes: it is no PEM file.")
    return contents


def _key(path: Path) -> bytes:
    contents = _read("key", path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o007:
        raise CredentialsError("key", f"{path} has the mode {mode:04o}: every user can use it. Set the mode 0600.")
    return contents


def _private_key(path: Path, pem: bytes) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise CredentialsError("key", f"{path} has no private key in PEM without a password.") from error


def _certificates(field: str, path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CredentialsError(field, f"{path} has no certificate in PEM.") from error


def _revocations(path: Path, pem: bytes, authorities: list[x509.Certificate]) -> None:
    try:
        revoked = x509.load_pem_x509_crl(pem)
    except ValueError as error:
        raise CredentialsError("crl", f"{path} has no revocation list in PEM.") from error
    if not any(revoked.issuer == authority.subject for authority in authorities):
        issuer = revoked.issuer.rfc4514_string()
        raise CredentialsError("crl", f"{path} is of the issuer {issuer}, which is not in tls.ca.")


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _spki(key: object) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return encoded


def _names(leaf: x509.Certificate) -> CertificateNames:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return CertificateNames()
    return CertificateNames(
        uris=tuple(found.get_values_for_type(x509.UniformResourceIdentifier)),
        dns=tuple(found.get_values_for_type(x509.DNSName)),
        ips=tuple(str(address) for address in found.get_values_for_type(x509.IPAddress)),
    )
