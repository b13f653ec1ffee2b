"""What the kernel does with a frame that goes bad (Documentation/admin-guide/sysctl/vm.rst, CONFIG_MEMORY_FAILURE)."""

from __future__ import annotations

from pathlib import Path

from vmferry.cli.probe.finding import Finding, ok, warn
from vmferry.cli.probe.host import meminfo
from vmferry.client.plain import size_words

SYSCTLS = Path("/proc/sys/vm")
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


def _sysctl(name: str) -> int | None:
    """Its value; None on a kernel that has none."""
    path = SYSCTLS / name
    return int(path.read_text()) if path.exists() else None
