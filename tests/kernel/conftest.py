"""Runs one case of a small C program and returns what the kernel did.

The cases run in processes of their own with a time limit: a touch of a page that never comes would hang this one, and a
SIGBUS would end it. They are C because Python cannot touch registered memory without holding its own lock (see
`test_python_lock.py`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.support import c_programs
from tests.support.huge_pages import reserved
from vmferry.demo.patience import patient

DEADLINE_S = patient(60)
LACKING = 77
HUGE_PAGES_NEEDED = 6
RECOVERY = Path("/proc/sys/vm/memory_failure_recovery")

Answers: TypeAlias = dict[str, str]
Ask: TypeAlias = Callable[[str, str, str], Answers]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles a program once a session; returns its path."""
    directory = tmp_path_factory.mktemp("kernel")
    return lambda name: c_programs.compiled(c_programs.KERNEL / f"{name}.c", directory)


@pytest.fixture(scope="session")
def ask(compiled: Callable[[str], Path]) -> Ask:
    """`ask(program, case, backing)`: the case's `key=value` lines; skips where kernel or user lack something."""

    def run(program: str, case: str, backing: str) -> Answers:
        command = [compiled(program), case, backing]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        if done.returncode == LACKING:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, f"{program} {case} {backing}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    return run


@pytest.fixture(scope="session")
def real_frames() -> None:
    """Leave to take frames of this host out of service, and a kernel that can."""
    if not RECOVERY.exists():
        pytest.skip("this kernel has no CONFIG_MEMORY_FAILURE")
    if "VMFERRY_TEST_HWPOISON" not in os.environ:
        pytest.skip("takes frames out of service until the next boot: set VMFERRY_TEST_HWPOISON=1 to run it")
    if os.geteuid() != 0:
        pytest.skip("only root may poison a frame")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """A few 2 MiB pages."""
    with reserved(HUGE_PAGES_NEEDED):
        yield
