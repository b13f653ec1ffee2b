"""The tutorial's commands, as they stand there, with real daemons and a VM in a network namespace of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.house.markdown import fences
from vmferry.demo.patience import patient

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = [fence.text for fence in fences(TEXT) if fence.language == "sh"]
SCRIPT = "".join(["set -euo pipefail\n", *BLOCKS[1:]])
SHOWN = [line.split() for fence in fences(TEXT) if fence.language == "text" for line in fence.text.splitlines()]
LIMIT_S = patient(280.0)
LEAVE_S = patient(10.0)


@pytest.fixture
def own_network(namespaces: None) -> Iterator[str]:
    """A namespace with loopback alone, so that the tutorial's ports are free."""
    name = f"vmferry-tutorial-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For `mktemp`: the path of a pager's socket must fit the kernel's 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        yield Path(directory)


def run(network: str, directory: Path) -> str:
    """Runs the script; returns its output. Always ends every process that it started."""
    output = directory / "output"
    with output.open("w") as file:
        child = subprocess.Popen(
            ["ip", "netns", "exec", network, "bash", "-c", SCRIPT],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            left = {}
            for pid in _left_after(network, LEAVE_S if code == 0 else 0.0):
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    left[pid] = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    os.kill(pid, signal.SIGKILL)
            child.wait()
    said = output.read_text()
    assert code == 0, f"exit code {code} of the tutorial (-1: not done after {LIMIT_S:g} s):\n{said}"
    assert not left, f"the tutorial left processes behind: {left}\n{said}"
    return said


def _left_after(network: str, seconds: float) -> list[int]:
    """The processes in the namespace once all have ended, or after that time. A process that was told to end still
    takes a moment to give back a guest's memory, and `wait` in the shell knows its own children alone."""
    end = time.monotonic() + seconds
    while True:
        listed = subprocess.run(["ip", "netns", "pids", network], check=True, capture_output=True, text=True)
        left = [int(pid) for pid in listed.stdout.split()]
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.05)


def headers() -> list[list[str]]:
    """The heads of the tables that the tutorial shows."""
    return [words for words in SHOWN if words and words[0] in ("VM", "ADDRESS")]


def test_it_begins_with_the_demo() -> None:
    """The script leaves the demo out: it may build the programs, and it has tests of its own."""
    assert BLOCKS[0] == "make demo\n"


@pytest.mark.timeout(300)
def test_the_tutorial_works_as_written(kvm: Path, uffd_poison: None, own_network: str, short_directory: Path) -> None:
    said = run(own_network, short_directory)
    lines = [line.split() for line in said.splitlines()]
    assert headers() and all(head in lines for head in headers()), said
    assert "web-1: COMPLETED" in said
    assert len([words for words in lines if words[:1] == ["0x10000000"]]) == 2, said
    before, after = (json.loads(line) for line in said.splitlines() if '"touches"' in line)
    assert after["wrong_bytes"] == 0
    assert after["touches"] > before["touches"]
    assert not list(short_directory.glob("tmp.*")), "the tutorial leaves its directory behind"
