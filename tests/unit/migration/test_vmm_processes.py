"""Processes as the kernel names them: a name is bytes, cut wherever 15 of them end (proc_pid_comm(5))."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.migration.environment import process_lives

SOURCES = Path(__file__).parents[3] / "src/vmferry"
NAMED = """
import sys
name = bytes.fromhex(sys.argv[1])
open("/proc/self/comm", "wb").write(name)
print("named", flush=True)
sys.stdin.read()
"""


NAMES = {"cut": "виртуалка-1".encode(), "no text": b"\xff\xfe", "brackets": b"a) R 1 (b"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_process_of_any_name_is_found_alive_and_then_dead(name: bytes) -> None:
    command = [sys.executable, "-c", NAMED, name.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"named\n"
        assert process_lives(child.pid)
        child.kill()
        child.wait()
        assert not process_lives(child.pid)


def test_text_of_the_kernel_is_never_read_as_strict_utf_8() -> None:
    strict = re.compile(r'"/(?:proc|sys)/[^"]*"\)\.read_text\(\)')
    # Files of /sys that hold numbers only.
    numeric = {"/sys/devices/system/cpu/online"}
    found = [
        (path.name, match)
        for path in SOURCES.rglob("*.py")
        for match in strict.findall(path.read_text())
        if not any(file in match for file in numeric)
    ]
    assert found == []
