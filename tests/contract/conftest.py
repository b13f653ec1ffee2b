"""The programs under test: the installed pager, without which the tests fail and do not skip, and a VMM in C."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.contract.destination_rig import Destination, destination_of
from tests.support.contract.real_errors import EARLY_KILL, why_not
from tests.support.contract.vmm_child import compile_child
from tests.support.programs import Programs


@pytest.fixture(scope="session")
def pager_program(programs: Programs) -> str:
    return str(programs.pager)


@pytest.fixture(scope="session")
def vmm_child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_child(tmp_path_factory.mktemp("vmm"))


@pytest.fixture(params=["anonymous", "memfd", "memfd, ahead", "memfd, two uffds", "anonymous, two uffds"])
async def destination(
    request: pytest.FixtureRequest, uffd_poison: None, pager_program: str, vmm_child: Path, tmp_path: Path
) -> AsyncIterator[Destination]:
    """A destination that waits for its VMM to attach, on each backing; "ahead": memory is allocated before."""
    backing, _, way = request.param.partition(", ")
    async with destination_of(pager_program, vmm_child, backing, tmp_path, 2 if way == "two uffds" else 1) as made:
        made.ahead = way == "ahead"
        yield made


@pytest.fixture
async def anonymous(
    uffd_poison: None, pager_program: str, vmm_child: Path, tmp_path: Path
) -> AsyncIterator[Destination]:
    """The same on anonymous memory only, for tests that do not depend on the backing."""
    async with destination_of(pager_program, vmm_child, "anonymous", tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def real_frames() -> None:
    """Leave to make frames of this host bad, and a kernel that can."""
    if why := why_not():
        pytest.skip(why)


@pytest.fixture(params=["late", "early"])
def host_policy(request: pytest.FixtureRequest, real_frames: None) -> Iterator[str]:
    """When the host tells processes of a bad frame: at a touch, or as soon as it finds it."""
    before = EARLY_KILL.read_text()
    EARLY_KILL.write_text(str(int(request.param == "early")))
    yield request.param
    EARLY_KILL.write_text(before)
