# ruff: noqa: ASYNC110, ASYNC240 these tests poll a timer without a signal; they read a few bytes of a file
"""The requests that keep CPUs awake, and their length."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from vmferry.daemon.processors import LATENCY_FILE, HostProcessors
from vmferry.demo.patience import patient


def holders(file: Path) -> int:
    """The descriptors of this process that refer to the file."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            found += link.readlink() == file
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "cpu_dma_latency"
    made.touch()
    return made


async def test_they_are_awake_while_anybody_wants_it(file: Path) -> None:
    processors = HostProcessors(file)
    assert holders(file) == 0
    for who in ("m1-source", "m2-source", "m1-source"):
        processors.keep_awake(who)
        assert holders(file) == 1
    assert struct.unpack("i", file.read_bytes()) == (0,)
    processors.let_sleep("m1-source")
    processors.let_sleep("m3-source")
    assert holders(file) == 1
    processors.let_sleep("m2-source")
    processors.let_sleep("m2-source")
    assert holders(file) == 0


async def test_a_forgotten_request_ends_after_its_limit(file: Path) -> None:
    processors = HostProcessors(file, at_most_s=0.01)
    processors.keep_awake("m1-source")
    async with asyncio.timeout(patient(20)):
        while holders(file):
            await asyncio.sleep(0.001)
    processors.let_sleep("m1-source")
    processors.keep_awake("m1-source")
    assert holders(file) == 1
    processors.let_sleep("m1-source")


async def test_without_permission_a_switchover_continues_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processors = HostProcessors(tmp_path / "missing")
    for _ in range(3):
        processors.keep_awake("m1-source")
        processors.let_sleep("m1-source")
    assert capsys.readouterr().out.count("processors.not_kept_awake") == 1


async def test_the_kernel_takes_the_request() -> None:
    if not LATENCY_FILE.exists():
        pytest.skip(f"no {LATENCY_FILE} here")
    try:
        before = struct.unpack("i", LATENCY_FILE.read_bytes())
    except PermissionError:
        pytest.skip(f"{LATENCY_FILE} may not be opened by this user")
    processors = HostProcessors()
    processors.keep_awake("m1-source")
    assert struct.unpack("i", LATENCY_FILE.read_bytes()) == (0,)
    processors.let_sleep("m1-source")
    assert struct.unpack("i", LATENCY_FILE.read_bytes()) == before
