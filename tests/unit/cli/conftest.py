"""A daemon with one VM, which the verbs ask."""

from __future__ import annotations

import pytest

from tests.support.scripted.cli import Script, scripted_daemon
from vmferry.v1 import machines_pb2


@pytest.fixture
def script():
    return Script(machines=[machines_pb2.Machine(vm="web-1", state=machines_pb2.MACHINE_STATE_RUNNING, vcpus=2)])


@pytest.fixture
def daemon(script, monkeypatch):
    with scripted_daemon(script) as address:
        monkeypatch.setenv("VMFERRY_API", address)
        yield address
