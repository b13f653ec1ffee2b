"""The pager program that these tests drive: the installed one; its absence is a failure, not a skip."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pager_program() -> str:
    beside = Path(sys.executable).parent / "vmferry-pager"
    named = os.environ.get("VMFERRY_PAGER")
    found = named or (str(beside) if beside.exists() else shutil.which("vmferry-pager"))
    if found is None:
        pytest.fail(f"vmferry-pager is neither {beside} nor on PATH; `make setup` installs it")
    return found
