"""Two daemons a module, and the QEMUs that the machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.qemu import Hosts, Qemu, qemu_hosts
from vmferry.demo.qemu.program import UNPACKED, installed_qemu, unpacked_qemu


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hosts(programs, uffd_poison, kvm) -> AsyncIterator[Hosts]:
    async with qemu_hosts() as made:
        yield made


@pytest.fixture(scope="session")
def qemu72() -> Qemu:
    found = installed_qemu()
    if found is None:
        pytest.skip("no qemu-system-x86_64: apt-get install qemu-system-x86")
    return found


@pytest.fixture(scope="session")
def qemu10() -> Qemu:
    found = unpacked_qemu()
    if found is None:
        pytest.skip(f"no newer QEMU in {UNPACKED}: deploy/debian/newer-qemu {UNPACKED} unpacks it")
    return found
