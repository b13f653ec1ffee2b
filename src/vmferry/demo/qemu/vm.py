"""A QEMU on the stage: its process, and a second monitor, which is the stage's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.demo.admin import AdminError, GuestReport, Mapped, report_of
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process
from vmferry.demo.programs import find_program
from vmferry.demo.qemu.image import Image, report_of_dump
from vmferry.demo.qemu.poison import poison_pages
from vmferry.demo.stage import StageError
from vmferry.errors import Reason, VmferryError
from vmferry.units import PAGE_4K
from vmferry.vmm.qemu.adopted import close_survey
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process as ProcessId
from vmferry.vmm.qemu.reach import ReachProgram
from vmferry.vmm.qemu.survey import Surveyor

ANSWER_S = patient(20.0)
START_S = patient(20.0)
CPU = "host,-arch-capabilities"
"""MSR 0x10a is left out: KVM on AMD names bits of it that it then refuses to set. The guest never reads it."""
MACHINE = "pc,accel=kvm,hpet=off,vmport=off,smm=off"
WAITS = ("-S", "-incoming", "defer")
BACKENDS = {"anonymous": "memory-backend-ram", "memfd": "memory-backend-memfd,share=on"}

Tell = Callable[[int], Awaitable[object]]
"""Reports the memory error at a GPA to the daemon."""


@dataclass(frozen=True, slots=True)
class Sockets:
    """The monitors of one QEMU: the daemon's, and the stage's."""

    daemon: Path
    own: Path


@dataclass(frozen=True, slots=True)
class Shape:
    """A QEMU with the payload guest. `backing` is a key of `BACKENDS`."""

    vm: str
    memory_mib: int
    vcpus: int
    backing: str
    image: Image


def arguments(shape: Shape, sockets: Sockets) -> list[str]:
    """The words behind the program's name."""
    return [
        *("-name", f"{shape.vm},debug-threads=on", "-nodefaults", "-display", "none", "-vga", "none", "-cpu", CPU),
        *("-machine", f"{MACHINE},memory-backend=ram", "-m", str(shape.memory_mib), "-smp", str(shape.vcpus)),
        *("-object", f"{BACKENDS[shape.backing]},id=ram,size={shape.memory_mib}M"),
        *("-qmp", f"unix:{sockets.own},server=on,wait=off", "-qmp", f"unix:{sockets.daemon},server=on,wait=off"),
        *shape.image.options,
    ]


async def monitor_of(process: Process, path: Path) -> Monitor:
    """The monitor, as soon as QEMU listens there. Raises: StageError if it ends before."""
    while True:
        if not process.alive:
            raise StageError(f"{process.name} ended:\n{process.last_words()}")
        try:
            return await Monitor.connect(path, START_S)
        except VmferryError as error:
            if error.reason is not Reason.VMM_GONE:
                raise
        await asyncio.sleep(0.02)


class QemuAdmin:
    """A QEMU through its monitor: implements `GuestAdmin`."""

    def __init__(self, vm: str, monitor: Monitor, image: Image, directory: Path, tell: Tell) -> None:
        self._vm = vm
        self._monitor = monitor
        self._image = image
        self._directory = directory
        self._tell = tell
        self._reach = ReachProgram(lambda: str(find_program("vmferry-reach")), ANSWER_S)

    async def ask(self, command: str, **arguments: object) -> Any:
        """Raises: AdminError."""
        try:
            return await self._monitor.ask(command, ANSWER_S, arguments)
        except VmferryError as error:
            raise AdminError(error.message) from error.__cause__

    async def raw_report(self) -> dict[str, Any]:
        """The fields of the reference VMM's `report`."""
        dump = self._directory / f"{self._vm}-{id(self):x}.dump"
        await self.ask("pmemsave", val=0, size=self._image.dump_bytes, filename=str(dump))
        return await report_of_dump(dump)

    async def report(self) -> GuestReport:
        answer = await self.raw_report()
        return report_of({"state": await self.status(), **answer})

    async def status(self) -> str:
        return str((await self.ask("query-status"))["status"])

    async def regions(self) -> list[Mapped]:
        surveyor = Surveyor(self._monitor, self._reach, ANSWER_S)
        process = ProcessId.of(await surveyor.process_id())
        try:
            survey = await surveyor.facts(process)
            close_survey(survey)
        finally:
            os.close(process.pidfd)
        return [Mapped(one.region.gpa, one.hva, one.region.size, one.page_size) for one in survey.facts.memory]

    async def inject(self, gpas: Sequence[tuple[int, bool]], real_frames: bool = False) -> list[str]:
        """Puts a poison marker in QEMU's mapping for each page, and reports the pages with the flag.

        The pages read as zeros for a moment, so no pager may read them yet.
        """
        if real_frames:
            return ["QEMU's frames are not taken out of service"] * len(gpas)
        regions = await self.regions()
        places = [one.hva + gpa - one.gpa for gpa, _ in gpas for one in regions if gpa in one.gpas]
        was = await self.status()
        if was == "running":
            await self.ask("stop")
        try:
            await poison_pages(self._monitor, self._reach, [(hva, PAGE_4K) for hva in places])
        except VmferryError as error:
            raise AdminError(error.message) from error
        finally:
            if was == "running":
                await self.ask("cont")
        for gpa, tell in gpas:
            if tell:
                await self._tell(gpa)
        return [""] * len(gpas)

    async def refusal(self) -> str:
        """QEMU's own words to `migrate`; "" if it does not refuse."""
        try:
            await self.ask("migrate", uri="tcp:127.0.0.1:1")
        except AdminError as error:
            return str(error.__cause__ or error.message)
        return ""

    async def close(self) -> None:
        await self._monitor.close()
