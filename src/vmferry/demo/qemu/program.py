"""Finds the QEMU programs of this machine."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vmferry.demo.patience import patient

PROGRAM = "qemu-system-x86_64"
UNPACKED = Path(sys.prefix) / "qemu"
"""Where deploy/debian/newer-qemu unpacks a later version."""
_DATA = ("/usr/share/seabios", "/usr/share/qemu")
_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)")
VERSION_S = patient(20.0)

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class QemuProgram:
    """A QEMU; `argv` begins its command line."""

    version: Version
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"QEMU {'.'.join(map(str, self.version))}"


@functools.cache
def installed_qemu() -> QemuProgram | None:
    found = shutil.which(PROGRAM)
    return _asked((found,)) if found else None


@functools.cache
def unpacked_qemu() -> QemuProgram | None:
    program, data = UNPACKED / "usr/bin" / PROGRAM, UNPACKED / "usr/share/qemu"
    if not program.exists():
        return None
    return _asked((str(program), *(word for place in (str(data), *_DATA) for word in ("-L", place))))


def chosen_qemu(program: str) -> QemuProgram | None:
    """The program of that path, "" the newest one here. None: there is none that runs."""
    if program:
        return _asked((program,))
    found = [one for one in (installed_qemu(), unpacked_qemu()) if one is not None]
    return max(found, key=lambda one: one.version, default=None)


def _asked(argv: tuple[str, ...]) -> QemuProgram | None:
    """None where it does not run here."""
    try:
        words = subprocess.run([*argv, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(words.stdout)
    return QemuProgram((int(found[1]), int(found[2]), int(found[3])), argv) if found else None
