"""Two daemons a module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.support.huge_pages import reserved
from tests.support.scenario.harness import Pair, two_hosts, unique


@pytest_asyncio.fixture(loop_scope="module")
async def pair(hosts: Pair) -> AsyncIterator[Pair]:
    """The module's two hosts without the guests of other tests, which would take the machine's time."""
    yield hosts
    await hosts.stage.dismiss_guests()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hosts(programs, uffd_poison) -> AsyncIterator[Pair]:
    """Two hosts; short time-outs, so that what never answers is found soon."""
    quick = {"timeouts": "vmm_s = 2.0\npeer_s = 5.0\nattach_s = 3.0"}
    async with two_hosts(quick, quick) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def hasty_pair(hasty_hosts: Pair) -> AsyncIterator[Pair]:
    """The same of hosts that give up on a VMM soon."""
    yield hasty_hosts
    await hasty_hosts.stage.dismiss_guests()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hasty_hosts(programs, uffd_poison) -> AsyncIterator[Pair]:
    """Two hosts for VMMs that never answer: the longest of a VMM's time-outs is six times `vmm_s`."""
    hasty = {"timeouts": "vmm_s = 0.5\npeer_s = 5.0\nattach_s = 1.0"}
    async with two_hosts(hasty, hasty) as made:
        yield made


HUGE_PAGES = 128
"""Two guests of 64 MiB on pages of 2 MiB, twice."""


@pytest.fixture(scope="module")
def huge_pages() -> Iterator[None]:
    """Huge pages for the guests of one test."""
    with reserved(HUGE_PAGES):
        yield


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> str:
    """A name of the test's own."""
    return unique(request.node.name.removeprefix("test_"))


@pytest.fixture
def accel(request: pytest.FixtureRequest) -> str:
    """The accelerator of an indirect parameter; skips where the machine has no KVM."""
    if request.param == "kvm":
        request.getfixturevalue("kvm")
    return str(request.param)
