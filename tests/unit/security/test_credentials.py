"""Files that do not fit, each refused with its field and a remedy."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tls import DOMAIN, early_files, expired_files, host_files, user_files
from vmferry.security.credentials import CredentialFiles, CredentialsError, load
from vmferry.security.identity import Identity
from vmferry.security.names import host_id
from vmferry.security.pki import Authority


def refusal(files: CredentialFiles, host: str = "a") -> CredentialsError:
    with pytest.raises(CredentialsError) as caught:
        Identity(files, DOMAIN, host)
    return caught.value


def test_the_own_certificate_is_accepted(authority: Authority) -> None:
    assert Identity(host_files(authority, "a"), DOMAIN, "a").days_left() > 80


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    assert "expired on" in refusal(expired_files(authority, "a")).message


def test_a_certificate_of_the_future_is_refused(authority: Authority) -> None:
    assert "clock" in refusal(early_files(authority, "a")).message


def test_the_certificate_of_another_host_is_refused(authority: Authority) -> None:
    error = refusal(host_files(authority, "b"))
    assert error.field == "cert"
    assert host_id(DOMAIN, "b") in error.message
    assert host_id(DOMAIN, "a") in error.message


def test_the_certificate_of_a_user_is_no_hosts(authority: Authority) -> None:
    assert refusal(user_files(authority, "alice")).field == "cert"


def test_the_key_of_another_certificate_is_refused(authority: Authority) -> None:
    files = replace(host_files(authority, "a"), key=host_files(authority, "b").key)
    error = refusal(files)
    assert error.field == "key"
    assert "another certificate" in error.message


def test_a_missing_key_is_refused(authority: Authority, tmp_path: Path) -> None:
    error = refusal(replace(host_files(authority, "a"), key=tmp_path / "none"))
    assert (error.field, "cannot be read" in error.message) == ("key", True)


def test_a_key_that_every_user_reads_is_refused(authority: Authority, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(host_files(authority, "a").key.read_bytes())
    key.chmod(0o604)
    assert "0604" in refusal(replace(host_files(authority, "a"), key=key)).message


@pytest.mark.parametrize("field", ["cert", "key", "ca", "crl"])
@pytest.mark.parametrize(
    "contents", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\0" * 99]
)
def test_files_that_are_no_pem_are_refused(authority: Authority, tmp_path: Path, field: str, contents: bytes) -> None:
    wrong = tmp_path / field
    wrong.write_bytes(contents)
    wrong.chmod(0o600)
    files = replace(host_files(authority, "a"), **{field: wrong})
    if field == "crl" and not contents:
        return  # An empty list: nothing is revoked.
    assert refusal(files).field == field


def test_a_file_without_end_is_refused(authority: Authority, tmp_path: Path) -> None:
    error = refusal(replace(host_files(authority, "a"), ca=Path("/dev/zero")))
    assert "more than" in error.message


def test_the_certificate_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = host_files(Authority.init(tmp_path / "other"), "a")
    assert "was not issued" in refusal(replace(other, ca=authority.certificate, crl=None)).message


def test_the_revocation_list_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other", "another CA")
    assert refusal(replace(host_files(authority, "a"), crl=other.revocations)).field == "crl"


def test_neither_the_representation_nor_the_errors_show_the_key(authority: Authority) -> None:
    files = host_files(authority, "a")
    secret = files.key.read_text().splitlines()[1]
    assert secret not in repr(load(files))
    assert secret not in str(refusal(replace(files, cert=files.key)))


def test_made_keys_are_for_their_owner_alone(authority: Authority) -> None:
    mask = os.umask(0)
    try:
        files = authority.issue("open", host_id(DOMAIN, "open"))
    finally:
        os.umask(mask)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert (authority.directory / "ca.key").stat().st_mode & 0o777 == 0o600
