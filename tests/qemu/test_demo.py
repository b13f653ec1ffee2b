"""`vmferry demo --qemu`: QEMU itself refuses to migrate the poisoned guest, and vmferry moves it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.support.qemu import Qemu
from vmferry.demo.patience import patient

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(200)]

VMFERRY = Path(sys.executable).parent / "vmferry"
DEMO_S = patient(120.0)
REFUSAL = "Can't migrate this vm with hardware poisoned memory"


async def demo(*options: str) -> tuple[dict[str, object], str]:
    """The demo's object, and its words."""
    words = [str(VMFERRY), "demo", "--memory", "96M", "--poison", "8", "--json", *options]
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEMO_S):
            output, notes = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode == 0, f"{output.decode()}\n{notes.decode()}"
    found: dict[str, object] = json.loads(output)
    return found, notes.decode()


async def test_the_demo_moves_the_guest_that_its_qemu_refuses(
    programs, uffd_poison, kvm, qemu10: Qemu, namespaces
) -> None:
    found, notes = await demo("--qemu")
    assert found["ok"] and not found["problems"]
    assert qemu10.name in notes
    assert REFUSAL in notes
    assert found["guest"]["wrong_bytes"] == 0  # type: ignore[index]
    assert found["poisoned"]["before"] == 8  # type: ignore[index]
    assert sum(found["poisoned"]["found_by"].values()) >= 8, "those that nobody reported were found"  # type: ignore[index]


async def test_the_demo_moves_the_qemu_of_the_distribution(
    programs, uffd_poison, kvm, qemu72: Qemu, namespaces
) -> None:
    """It would not refuse its own migration, and end by it."""
    found, notes = await demo("--qemu", qemu72.argv[0], "--vcpus", "1")
    assert found["ok"] and not found["problems"]
    assert qemu72.name in notes and REFUSAL not in notes
