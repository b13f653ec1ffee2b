"""The system calls and capabilities that the systemd unit allows, and a launcher that allows no other.

`systemd-analyze syscall-filter` names the groups, `asm/unistd_64.h` and `linux/capability.h` have the numbers.
"""

from __future__ import annotations

import ctypes
import errno
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy/systemd/vmferryd.service"
NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

CAPABILITIES = Path("/usr/include/linux/capability.h")

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def missing_tool() -> str:
    """What this machine lacks to know the filter; empty if nothing."""
    if shutil.which("systemd-analyze") is None:
        return "no systemd-analyze on this machine"
    absent = [str(path) for path in (NUMBERS, CAPABILITIES) if not path.exists()]
    return f"no {' and no '.join(absent)} on this machine" if absent else ""


def allowed_calls() -> set[str]:
    """The names that the unit's SystemCallFilter stands for."""
    groups = _groups()

    def expand(word: str) -> set[str]:
        return set().union(*map(expand, groups[word])) if word.startswith("@") else {word}

    return set().union(*map(expand, _words("SystemCallFilter")))


def capabilities() -> set[int]:
    """The numbers of the unit's CapabilityBoundingSet."""
    table = dict(re.findall(r"#define (CAP_\w+)\s+(\d+)", CAPABILITIES.read_text()))
    return {int(table[name]) for name in _words("CapabilityBoundingSet")}


def _words(key: str) -> list[str]:
    line = next(line for line in UNIT.read_text().splitlines() if line.startswith(f"{key}="))
    return line.split("=", 1)[1].split()


def _groups() -> dict[str, list[str]]:
    listing = subprocess.run(["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True).stdout
    groups: dict[str, list[str]] = {}
    for line in listing.splitlines():
        word = line.strip()
        if line.startswith("@"):
            groups[word] = members = []
        elif word and not word.startswith("#") and groups:
            members.append(word)
    return groups


def numbers(names: set[str]) -> list[int]:
    """Of those calls that this architecture has."""
    table = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", NUMBERS.read_text()))
    return sorted(int(table[name]) for name in names if name in table)


def bound(kept: set[int]) -> None:
    """The programs that this process executes get no other capability (capabilities(7)). It needs CAP_SETPCAP."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = 0
    while libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in kept and libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])
        number += 1


def confine(allowed: list[int]) -> None:
    """Any other system call kills this process or its child that makes it (seccomp(2))."""
    steps = [(_LOAD, 0, 0, 0)]
    for number in allowed:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _KILL))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), errno.errorcode[ctypes.get_errno()])


def launcher(directory: Path, calls: set[str], command: list[str]) -> list[str]:
    """A command that runs `command`, with more arguments, with these calls and the unit's capabilities alone."""
    script = directory / "confined.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.support.unit_filter import bound, confine\n"
        f"bound({capabilities()!r})\n"
        f"confine({numbers(calls)!r})\n"
        f"command = {command!r} + sys.argv[1:]\n"
        "os.execvp(command[0], command)\n"
    )
    return [sys.executable, str(script)]
