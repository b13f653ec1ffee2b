"""A Linux for a guest in the guest: the kernel that the lab boots, and one program as its initial RAM disk."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.lab.debian import CACHE, Kernel, emulator

VARIABLE = "VMFERRY_LAB_LINUX"
SOURCE = Path(__file__).with_name("linux_guest.c")
CONSOLE = (5, 1)
"""Of /dev/console (admin-guide/devices.txt)."""
DIRECTORY, PROGRAM, DEVICE = 0o040755, 0o100755, 0o020600


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """What the test in the lab needs: the words of QEMU, and two paths."""

    qemu: list[str]
    kernel: str
    initrd: str

    @staticmethod
    def named() -> LinuxGuest | None:
        """The one that the environment names; None elsewhere than in the lab."""
        text = os.environ.get(VARIABLE)
        return LinuxGuest(**json.loads(text)) if text else None

    def encode(self) -> str:
        return json.dumps(asdict(self))


def made(booted: Kernel) -> LinuxGuest:
    """Raises: CalledProcessError: it does not compile. LackingError: there is no QEMU."""
    program, initrd = CACHE / "linux-guest", CACHE / "linux-guest.cpio"
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-o", program, SOURCE], check=True)
    entries = [("dev", DIRECTORY, b"", (0, 0)), ("dev/console", DEVICE, b"", CONSOLE)]
    entries += [("init", PROGRAM, program.read_bytes(), (0, 0)), ("TRAILER!!!", 0, b"", (0, 0))]
    initrd.write_bytes(b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1)))
    return LinuxGuest(emulator(), str(booted.image), str(initrd))


def _entry(number: int, name: str, mode: int, contents: bytes, device: tuple[int, int]) -> bytes:
    """A file of a cpio archive in the "newc" format (driver-api/early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(contents), 0, 0, *device, len(path), 0)
    return _padded(b"070701" + b"".join(b"%08x" % field for field in fields) + path) + _padded(contents)


def _padded(text: bytes) -> bytes:
    return text + b"\0" * (-len(text) % 4)
