"""A small certificate authority in a directory, for a lab, the demo and the tests. A fleet brings its own.

`ca.crt`, `ca.key`, `ca.crl` and, for each name, `NAME.crt` and `NAME.key`. Keys are P-256 and have the mode 0600.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmferry.errors import Reason, VmferryError
from vmferry.model.names import is_ip
from vmferry.security.credentials import CredentialFiles

CA_DAYS = 3650
CRL_DAYS = 365
SKEW = dt.timedelta(minutes=10)
"""Certificates begin so long ago, for hosts whose clock is late."""


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority of one directory."""

    directory: Path

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def revocations(self) -> Path:
        return self.directory / "ca.crl"

    def files(self, name: str) -> CredentialFiles:
        """The files of an issued name, with the revocation list."""
        return CredentialFiles(
            self.directory / f"{name}.crt", self.directory / f"{name}.key", self.certificate, self.revocations
        )

    @classmethod
    def init(cls, directory: Path, common_name: str = "vmferry CA", days: float = CA_DAYS) -> Authority:
        """Makes the authority. Raises: VmferryError INVALID_ARGUMENT, there is one already."""
        authority = cls(directory)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if authority.certificate.exists():
            raise VmferryError(
                Reason.INVALID_ARGUMENT, f"{authority.certificate} exists already.", "Name another directory."
            )
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        now = dt.datetime.now(dt.UTC)
        usage = _usage(signs_certificates=True)
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_secret(directory / "ca.key", _key_pem(key))
        authority.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        authority._write_revocations([], key, certificate)
        return authority

    def issue(
        self,
        name: str,
        uri: str,
        addresses: Sequence[str] = (),
        begins: dt.timedelta = -SKEW,
        lasts: dt.timedelta = dt.timedelta(days=90),
    ) -> CredentialFiles:
        """Issues a certificate with this URI for these DNS names and IP addresses, and its key.

        `begins` and `lasts` count from now. An earlier certificate of the name is replaced, as in a rotation.
        """
        ca_key, ca = self._load()
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
        names += [x509.IPAddress(ipaddress.ip_address(a)) if is_ip(a) else x509.DNSName(a) for a in addresses]
        both_ways = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        certificate = (
            x509.CertificateBuilder(ca.subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(both_ways, critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        files = self.files(name)
        _write_secret(files.key, _key_pem(key))
        _replace(files.cert, certificate.public_bytes(Encoding.PEM), 0o644)
        return files

    def revoke(self, certificate: Path) -> None:
        """Adds a certificate to the revocation list."""
        key, ca = self._load()
        revoked = x509.load_pem_x509_certificate(certificate.read_bytes())
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(revoked.serial_number)
            .revocation_date(dt.datetime.now(dt.UTC))
            .build()
        )
        known = x509.load_pem_x509_crl(self.revocations.read_bytes())
        self._write_revocations([*known, entry], key, ca)

    def _load(self) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        try:
            key = load_pem_private_key((self.directory / "ca.key").read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise VmferryError(
                Reason.INVALID_ARGUMENT,
                f"{self.directory} has no authority that can be used: {error}.",
                "Make one with `vmferry pki init DIRECTORY`.",
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey), "made by init"
        return key, certificate

    def _write_revocations(
        self, entries: Sequence[x509.RevokedCertificate], key: ec.EllipticCurvePrivateKey, ca: x509.Certificate
    ) -> None:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.subject)
            .last_update(now - SKEW)
            .next_update(now + dt.timedelta(days=CRL_DAYS))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(len(entries) + 1), critical=False)
        )
        for entry in entries:
            builder = builder.add_revoked_certificate(entry)
        _replace(self.revocations, builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_secret(path: Path, contents: bytes) -> None:
    _replace(path, contents, 0o600)


def _replace(path: Path, contents: bytes, mode: int) -> None:
    """Replaces the file as a whole: a daemon that reads it finds the old or the new one."""
    new = path.with_name(f".{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, contents)
    finally:
        os.close(fd)
    new.replace(path)
