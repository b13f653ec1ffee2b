"""A QEMU that follows a script, adopted as a real one is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.support.scripted.qemu import ScriptedPager, ScriptedQemu, ScriptedReach, scripted
from vmferry.demo.patience import patient
from vmferry.vmm.qemu.adopted import Adopted
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process
from vmferry.vmm.qemu.survey import Surveyor
from vmferry.vmm.qemu.vmm import QemuVmm
from vmferry.vmm.session import VmmDeadlines

WITHIN_S, SOON_S = patient(20.0), 1.0
STEPS = ("attach_memory_s", "stop_s", "save_state_s", "resume_s", "abandon_s", "load_state_s", "start_s")


@dataclass
class Rig:
    """One adopted QEMU, and all that it meets."""

    qemu: ScriptedQemu
    reach: ScriptedReach
    pager: ScriptedPager
    vmm: QemuVmm
    adopted: Adopted

    async def close(self) -> None:
        await self.vmm.close()

    async def adopt_again(self) -> None:
        """As a daemon does whose connection was lost."""
        await self.vmm.close()
        monitor = await Monitor.connect(self.qemu.path, WITHIN_S)
        process = Process.of(self.qemu.process.pid)
        self.adopted = Adopted(self.qemu.name, monitor, self.reach, process, VmmDeadlines(), WITHIN_S)
        self.vmm = await QemuVmm.adopt(self.adopted)

    def wait_within(self, seconds: float) -> None:
        """For each step. A step that is silent by its script takes as long."""
        self.adopted.within_s = seconds
        self.adopted.deadlines = VmmDeadlines(**dict.fromkeys(STEPS, seconds))


Adopt: TypeAlias = Callable[..., Awaitable[Rig]]


@pytest.fixture
def guests() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def adopt(tmp_path: Path, guests: ExitStack) -> AsyncIterator[Adopt]:
    """Starts a QEMU of the given properties and adopts it."""
    async with AsyncExitStack() as ends:

        async def make(**differs: Any) -> Rig:
            qemu = guests.enter_context(scripted(tmp_path / "qemu.qmp", **differs))
            pager = ScriptedPager(tmp_path / "memory.sock")
            server = await pager.serve()
            ends.callback(server.close)
            reach = ScriptedReach()
            monitor = await Monitor.connect(qemu.path, WITHIN_S)
            process = Process.of(await Surveyor(monitor, reach, WITHIN_S).process_id())
            adopted = Adopted(qemu.name, monitor, reach, process, VmmDeadlines(), WITHIN_S)
            vmm = await QemuVmm.adopt(adopted)
            rig = Rig(qemu, reach, pager, vmm, adopted)
            ends.push_async_callback(rig.close)
            return rig

        yield make
