"""The names in certificates."""

from __future__ import annotations

import pytest

from vmferry.security.names import CertificateNames, host_id

DOMAIN = "fleet.example.org"


@pytest.mark.parametrize(
    "uris",
    [
        (),
        (host_id(DOMAIN, "a"), host_id(DOMAIN, "b")),
        (host_id("other.example.org", "a"),),
        (f"spiffe://{DOMAIN}/vmferry/host/",),
        (f"spiffe://{DOMAIN}/vmferry/host/a/b",),
        (f"spiffe://{DOMAIN}/vmferry/user/a",),
        (f"spiffe://{DOMAIN}.evil/vmferry/host/a",),
        (f"https://{DOMAIN}/vmferry/host/a",),
        (host_id(DOMAIN, "a") + "\n",),
        (f"spiffe://{DOMAIN}/vmferry/host/a\0b",),
    ],
)
def test_only_one_host_id_of_the_own_domain_names_a_host(uris: tuple[str, ...]) -> None:
    assert CertificateNames(uris).host(DOMAIN) is None


def test_the_host_is_the_last_part_of_its_id() -> None:
    assert CertificateNames((host_id(DOMAIN, "rack-1.a"),)).host(DOMAIN) == "rack-1.a"


def test_an_address_is_compared_as_a_whole() -> None:
    names = CertificateNames(dns=("Host-A.example.org", "*.example.org"), ips=("10.0.0.1", "2001:DB8:0:0:0:0:0:1"))
    assert names.has_address("host-a.EXAMPLE.org")
    assert names.has_address("2001:db8::1")
    assert not names.has_address("host-b.example.org")
    assert not names.has_address("10.0.0.2")
    assert not names.has_address("10.0.0.10")
