"""What the kernel does with a frame that goes bad (Documentation/admin-guide/sysctl/vm.rst, CONFIG_MEMORY_FAILURE)."""

from __future__ import annotations

import os
from pathlib import Path

from vmferry.cli.probe import libc
from vmferry.cli.probe.attempt import attempt
from vmferry.cli.probe.finding import Finding, ok, warn
from vmferry.cli.probe.host import meminfo
from vmferry.client.plain import size_words

SYSCTLS = Path("/proc/sys/vm")
SOFT_OFFLINE = Path("/sys/devices/system/memory/soft_offline_page")
NAME = "memory errors"


def check_memory_failure() -> Finding:
    """When processes hear of a bad frame, and how much memory has gone bad."""
    recovers, early = _sysctl("memory_failure_recovery"), _sysctl("memory_failure_early_kill")
    if recovers is None:
        todo = "Such a host stops at an uncorrected error: boot a kernel with CONFIG_MEMORY_FAILURE to keep its guests."
        return warn(NAME, "the kernel has no CONFIG_MEMORY_FAILURE", todo)
    bad = f"{size_words(meminfo('HardwareCorrupted'))} out of service"
    if not recovers:
        return warn(
            NAME, f"vm.memory_failure_recovery 0, {bad}", "sysctl vm.memory_failure_recovery=1: it panics else."
        )
    told = "at once" if early else "at a touch, or at once if it asks"
    return ok(NAME, f"vm.memory_failure_early_kill {early or 0}: a process hears of a bad frame {told}; {bad}")


def try_hwpoison() -> str:
    """Asks for no page at all: the kernel only says whether it knows the advice."""
    address = libc.mmap(libc.PAGE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    seen = libc.madvise_errno(address, 0, libc.MADV_HWPOISON)
    if seen:
        raise OSError(seen, f"MADV_HWPOISON: {os.strerror(seen)}")
    return "MADV_HWPOISON makes frames bad, and signals its caller; only root may"


def check_hwpoison() -> Finding:
    """Whether tests, and `vmferry demo --real-frames`, can make frames of this host bad."""
    found = attempt(try_hwpoison)
    return ok("bad frames for tests", found.seen if found.worked else f"none can be made here ({found.seen})")


def check_soft_offline() -> Finding:
    """Whether the kernel moves contents off a frame with many corrected errors (vm.rst, enable_soft_offline)."""
    if not SOFT_OFFLINE.exists():
        todo = "Frames with corrected errors stay in use: a kernel with CONFIG_MEMORY_FAILURE can replace them."
        return warn("soft offline", f"{SOFT_OFFLINE} is not there", todo)
    if _sysctl("enable_soft_offline") == 0:
        return warn("soft offline", "vm.enable_soft_offline 0", "sysctl vm.enable_soft_offline=1 replaces weak frames.")
    return ok("soft offline", "a weak frame is replaced; the guest and both pagers notice nothing")


def _sysctl(name: str) -> int | None:
    """Its value; None on a kernel that has none."""
    path = SYSCTLS / name
    return int(path.read_text()) if path.exists() else None
