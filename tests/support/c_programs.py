"""Compiles the C programs of the tests. `VMFERRY_TEST_C` names a folder of compiled ones, for slow machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import SUPPORT, TESTS

VARIABLE = "VMFERRY_TEST_C"
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-pthread")
KERNEL = TESTS / "kernel"
VMM_CHILD = SUPPORT / "contract/vmm_child.c"


def compiled(source: Path, folder: Path) -> Path:
    """The program, compiled into `folder` unless it is there, or in the folder of compiled ones."""
    folder = Path(os.environ.get(VARIABLE, folder))
    program = folder / source.stem
    if not program.exists():
        subprocess.run(["gcc", *FLAGS, "-I", KERNEL, "-o", program, source], check=True)
    return program


def compile_all(folder: Path) -> None:
    """Those of the kernel tests and of the contract tests."""
    for source in [*KERNEL.glob("*.c"), VMM_CHILD]:
        compiled(source, folder)
