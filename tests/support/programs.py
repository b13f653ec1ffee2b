"""The programs under test as they are installed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Programs:
    """The programs as installed; `VMFERRY_PROGRAMS` names another directory, e.g. a cargo target directory."""

    pager: Path
    refvm: Path
    cli: Path
    daemon: Path


def installed_programs() -> Programs:
    """Fails the test where a program is missing: `make setup` builds them all."""
    return Programs(_program("vmferry-pager"), _program("vmferry-refvm"), _program("vmferry"), _program("vmferryd"))


def _program(name: str) -> Path:
    beside = [Path(os.environ[key]) for key in ("VMFERRY_PROGRAMS",) if key in os.environ]
    for directory in [*beside, Path(sys.executable).parent]:
        if (directory / name).exists():
            return directory / name
    pytest.fail(f"{name} is neither next to {sys.executable} nor in $VMFERRY_PROGRAMS; `make setup` installs it")
