"""Where a run was made."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from vmferry_bench import qemu


def machine() -> dict[str, Any]:
    """As JSON."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    version = (
        subprocess.run([qemu.QEMU, "--version"], capture_output=True, text=True, check=False) if qemu.usable() else None
    )
    return {
        "kernel": platform.release(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else "",
        "cores": os.cpu_count(),
        "qemu": version.stdout.splitlines()[0] if version and version.stdout else "not installed",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine_words(where: dict[str, Any]) -> str:
    """In one line."""
    return f"{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}; {where['qemu']}; {where['at']}."
