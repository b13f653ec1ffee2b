"""Makes frames of a host bad, as hardware does: for hosts that are thrown away afterwards."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

PAGE = 4096
CORRUPT = Path("/sys/kernel/debug/hwpoison/corrupt-pfn")
"""Documentation/mm/hwpoison.rst."""
SOFT_OFFLINE = Path("/sys/devices/system/memory/soft_offline_page")
EARLY_KILL = Path("/proc/sys/vm/memory_failure_early_kill")
PRESENT = 1 << 63
PFN = (1 << 55) - 1


def why_not() -> str:
    """Why no frame can be made bad here; empty if one can."""
    if "VMFERRY_TEST_HWPOISON" not in os.environ:
        return "takes frames out of service until the next boot: set VMFERRY_TEST_HWPOISON=1 to run it"
    if not EARLY_KILL.exists():
        return "this kernel has no CONFIG_MEMORY_FAILURE"
    if not os.access(CORRUPT, os.W_OK):
        return f"{CORRUPT} cannot be written: it needs root and modprobe hwpoison_inject"
    return ""


def frame_at(pid: int, address: int) -> int:
    """Number of the frame that a process has there.

    Raises: LookupError: none.
    """
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        (word,) = struct.unpack("Q", os.pread(pagemap.fileno(), 8, address // PAGE * 8))
    if not word & PRESENT or not word & PFN:
        raise LookupError(f"pid {pid} has no frame at {address:#x}: {word:#x}")
    return word & PFN


def fail_frame(frame: int) -> None:
    """The host finds it bad; no thread has touched it."""
    with CORRUPT.open("wb", buffering=0) as file:
        try:
            file.write(f"{frame:#x}\n".encode())
        except OSError as error:
            # Somebody uses it at the moment, so the kernel cannot set it aside. It is bad all the same.
            if error.errno != errno.EBUSY:
                raise


def soft_offline(frame: int) -> None:
    """The host moves the frame's contents away, as after many corrected errors."""
    SOFT_OFFLINE.write_text(f"{frame * PAGE:#x}\n")


def mapping_of(pid: int, name: str, size: int) -> int:
    """Where a process maps so many bytes, or more, of a file whose name has `name` in it.

    Raises: LookupError: nowhere.
    """
    text = Path(f"/proc/{pid}/maps").read_text()
    for start, end, path in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)$", text, re.MULTILINE):
        if name in path and int(end, 16) - int(start, 16) >= size:
            return int(start, 16)
    raise LookupError(f"pid {pid} maps no {size} bytes of {name}:\n{text}")
