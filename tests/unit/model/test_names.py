"""Each rule for a name is one, wherever the name comes from."""

from __future__ import annotations

import json

import pytest

from vmferry.api.validation import Checks, InvalidRequest
from vmferry.cli.values import host_port
from vmferry.model.names import is_migration_id, is_vm_name, parse_address
from vmferry.vmm import protocol


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("m1", True), ("a", True), ("a" + "b" * 62, True), ("a" + "b" * 63, False), ("1m", False), ("m-", False),
        ("M1", False), ("", False), ("m1\n", False), ("m_1", False),
    ],
)  # fmt: skip
def test_migration_ids(text: str, good: bool) -> None:
    assert is_migration_id(text) is good
    assert api_takes(lambda checks: checks.migration_id(text)) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("web-1", True), ("1", True), ("A.b_c", True), ("x" * 63, True), ("x" * 64, False), ("-web", False),
        ("", False), ("web\n", False), ("web 1", False),
    ],
)  # fmt: skip
def test_vm_names(text: str, good: bool) -> None:
    assert is_vm_name(text) is good
    assert api_takes(lambda checks: checks.vm(text)) is good
    assert vmm_may_say(text) is good


@pytest.mark.parametrize("text", ["h:1", "h_1.example:65535", "[::1]:9", "1.2.3.4:7601"])
def test_an_address_that_one_door_takes_all_take(text: str) -> None:
    assert str(parse_address(text)) == text == host_port(text)
    assert api_takes(lambda checks: checks.destination(text))


def api_takes(check: object) -> bool:
    checks = Checks()
    assert callable(check)
    check(checks)
    try:
        checks.done()
    except InvalidRequest:
        return False
    return True


def vmm_may_say(name: str) -> bool:
    hello = {
        "type": "hello", "version": 1, "vm": name, "pid": 1, "platform": "x", "vcpus": 0, "regions": [],
        "abilities": [], "state": "incoming",
    }  # fmt: skip
    try:
        protocol.decode_from_vmm(json.dumps(hello).encode())
    except protocol.ProtocolError as error:
        assert error.field == "vm"
        return False
    return True
