"""The payload guest as files that QEMU boots, and its report (`vmferry-refvm pc-guest`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.demo.options import GuestShape
from vmferry.demo.programs import find_program
from vmferry.demo.stage import StageError
from vmferry.units import MIB


@dataclass(frozen=True, slots=True)
class Image:
    """`options` of QEMU load the guest. The first `dump_bytes` of its memory hold its report."""

    options: tuple[str, ...]
    dump_bytes: int


async def make_image(directory: Path, shape: GuestShape) -> Image:
    """Raises: StageError."""
    words = [
        *("--memory-mib", str(shape.memory // MIB)),
        *("--vcpus", str(shape.vcpus)),
        *("--workload", shape.workload),
        *("--write-percent", str(shape.write_percent)),
        *("--seed", str(shape.seed)),
    ]
    made = await _pc_guest("image", str(directory), *words)
    return Image(tuple(made["options"]), int(made["dump_bytes"]))


async def report_of_dump(dump: Path) -> dict[str, Any]:
    """The fields of the admin socket's `report`. Raises: StageError."""
    return await _pc_guest("report", str(dump))


async def _pc_guest(*words: str) -> dict[str, Any]:
    argv: Sequence[str] = [str(find_program("vmferry-refvm")), "pc-guest", *words]
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaint = await process.communicate()
    if process.returncode:
        raise StageError(complaint.decode(errors="replace").strip())
    answer: dict[str, Any] = json.loads(output)
    return answer
