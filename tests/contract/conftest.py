"""What these tests drive: the installed pager, whose absence is a failure and not a skip, and a VMM in C beside it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from destination_rig import Destination, destination_of
from vmm_child import compile_child


@pytest.fixture(scope="session")
def pager_program() -> str:
    beside = Path(sys.executable).parent / "vmferry-pager"
    named = os.environ.get("VMFERRY_PAGER")
    found = named or (str(beside) if beside.exists() else shutil.which("vmferry-pager"))
    if found is None:
        pytest.fail(f"vmferry-pager is neither {beside} nor on PATH; `make setup` installs it")
    return found


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
    """The same on anonymous memory only, for what does not depend on it."""
    async with destination_of(pager_program, vmm_child, "anonymous", tmp_path) as made:
        yield made
