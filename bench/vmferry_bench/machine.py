"""Where a run was made."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from vmferry.demo.qemu.program import chosen_qemu, installed_qemu
from vmferry_bench.native import native
from vmferry_bench.network import congestion_control


def machine() -> dict[str, Any]:
    """As JSON."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    qemus = dict.fromkeys(one.name for one in (installed_qemu(), chosen_qemu("")) if one)
    return {
        "kernel": platform.release(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else "",
        "cores": os.cpu_count(),
        "qemu": ", ".join(qemus) or "no QEMU",
        "congestion_control": congestion_control(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


async def lateness(seconds: int) -> dict[str, Any]:
    """Measures how late the machine itself wakes threads, as JSON. Nothing else should run at the same time.

    Raises:
        BenchError: it could not be measured.
    """
    return await native("late", "--seconds", str(seconds))


def machine_words(where: dict[str, Any]) -> str:
    """The machine in words, and how late it wakes threads."""
    words = f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}; {where['qemu']}; {where['at']}."
    if "congestion_control" in where:
        words += f" Connections of QEMU and of the floor are paced by {where['congestion_control']}."
    late = where.get("late")
    if not late:
        return words
    thread = "real-time thread" if late["real_time"] else "thread (this process may have no real-time one)"
    return (
        f"{words} Before the run, a {thread} on each idle CPU slept for 1 ms at a time, for {late['seconds']:g} s. "
        f"It woke up to {late['longest_ms']:.1f} ms too late, and {late['over_1_ms']} times more than 1 ms."
    )
