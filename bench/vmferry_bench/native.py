"""The Rust part of the benchmark."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from vmferry_bench.shape import Shape

NATIVE = "vmferry-bench-native"
VARIABLE = "VMFERRY_BENCH_NATIVE"
"""Where it is, if not where cargo puts it."""


class BenchError(Exception):
    """A part of the benchmark could not be carried out."""


def program() -> str:
    """Its path."""
    target = os.environ.get("CARGO_TARGET_DIR") or str(Path(__file__).resolve().parents[2] / "target")
    return os.environ.get(VARIABLE) or str(Path(target) / "release" / NATIVE)


async def native(*arguments: str) -> dict[str, Any]:
    """Runs it, and returns its output.

    Raises:
        BenchError: it failed; with its words.
    """
    process = await asyncio.create_subprocess_exec(
        program(), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, words = await process.communicate()
    if process.returncode:
        raise BenchError(f"{NATIVE} {arguments[0]}: {words.decode(errors='replace').strip()}")
    answer: dict[str, Any] = json.loads(output)
    return answer


def guest_arguments(shape: Shape) -> list[str]:
    """The guest, without the backing of its memory."""
    names = ("memory_mib", "vcpus", "workload", "write_percent", "seed")
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(shape, name)))]
