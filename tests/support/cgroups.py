"""Real cgroups of this host, of whichever version has the controller."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmferry.daemon.memory_room import CGROUPS, UNIFIED
from vmferry.demo.patience import patient


@contextmanager
def limited(controller: str, limit_files: Sequence[str], limit: int) -> Iterator[Path]:
    """A new cgroup with a limit in the first of the files that it has; skips the test where the host has none."""
    above = _above(controller)
    made = above / f"vmferry-test-{uuid.uuid4().hex[:8]}"
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {above}: {error}")
    try:
        next(made / name for name in limit_files if (made / name).exists()).write_text(str(limit))
        yield made
    finally:
        _remove(made)


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """The command as a process of the cgroup."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group), *command]


def _remove(group: Path) -> None:
    """A process leaves its cgroup a moment after its end."""
    deadline = time.monotonic() + patient(10)
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _above(controller: str) -> Path:
    if (CGROUPS / controller).is_dir():
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.split(":", 2)[2] for line in lines if controller in line.split(":")[1].split(",")), "/")
        return CGROUPS / controller / own.lstrip("/")
    top = CGROUPS / UNIFIED if (CGROUPS / UNIFIED).is_dir() else CGROUPS
    try:
        if controller not in (top / "cgroup.controllers").read_text().split():
            pytest.skip(f"this host has no cgroup controller {controller}")
        (top / "cgroup.subtree_control").write_text(f"+{controller}")
    except OSError as error:
        pytest.skip(f"the cgroup controller {controller} cannot be used: {error}")
    return top
