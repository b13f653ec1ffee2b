"""Huge pages of 2 MiB that a test sets aside and gives back."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

POOL = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def reserved(count: int) -> Iterator[None]:
    """Adds `count` pages to the host's pool; skips the test where the host cannot.

    Several test processes share the pool, so each adds its own pages and later takes them away.
    """
    if not POOL.exists():
        pytest.skip("this kernel has no huge pages")
    try:
        made = _add(count)
    except OSError as error:
        pytest.skip(f"huge pages cannot be set aside: {POOL}: {error}")
    try:
        if made < count:
            pytest.skip(f"huge pages cannot be set aside: the host gave {made} of {count}")
        yield
    finally:
        _add(-made)


def _add(count: int) -> int:
    """Changes the pool, one process at a time; the difference that the kernel made."""
    with POOL.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(POOL.read_text())
        POOL.write_text(str(max(0, before + count)))
        return int(POOL.read_text()) - before
