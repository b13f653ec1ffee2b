"""Two daemons a module, and the QEMUs that the machine has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from vmferry_bench.native import program

from tests.support import qemu as support
from tests.support.qemu import Hosts, Qemu, qemu_hosts


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hosts(programs, uffd_poison, kvm) -> AsyncIterator[Hosts]:
    if not Path(program()).exists():  # noqa: ASYNC240 a local look
        pytest.skip(f"{program()} is missing: cargo build --release --locked --package vmferry-bench")
    async with qemu_hosts() as made:
        yield made


@pytest.fixture(scope="session")
def qemu72() -> Qemu:
    found = support.installed()
    if found is None:
        pytest.skip("no qemu-system-x86_64: apt-get install qemu-system-x86")
    return found


@pytest.fixture(scope="session")
def qemu10() -> Qemu:
    found = support.newer()
    if found is None:
        pytest.skip(f"no newer QEMU in {support.NEWER}: deploy/debian/newer-qemu {support.NEWER} unpacks it")
    return found
