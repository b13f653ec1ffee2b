"""The payload guest in a QEMU of a stage's host, which its daemon adopts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from vmferry.client.api import Api
from vmferry.demo.options import GuestShape
from vmferry.demo.processes import Process
from vmferry.demo.qemu.image import Image, make_image
from vmferry.demo.qemu.program import QemuProgram
from vmferry.demo.qemu.vm import WAITS, QemuAdmin, Shape, Sockets, arguments, monitor_of
from vmferry.demo.stage import Host, Stage
from vmferry.units import MIB
from vmferry.vmm.qemu.facts import TELLS_ADDRESSES

_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class QemuGuest:
    """Implements `AnyGuest`."""

    vm: str
    host: Host
    process: Process
    admin: QemuAdmin


def monitors(stage: Stage, name: str) -> str:
    """The lines of `[qemu]` for the host of this name: its daemon adopts the QEMUs of the stage."""
    return f"monitors = [{json.dumps(str(stage.root / name / '*.qmp'))}]"


def movable(program: QemuProgram, shape: GuestShape) -> GuestShape:
    """The shape, with memory that this QEMU can save: shared for one that tells no addresses of its blocks."""
    return shape if program.version >= TELLS_ADDRESSES else replace(shape, backing="memfd")


class QemuCasting:
    """Starts QEMUs of one program with one guest."""

    def __init__(self, stage: Stage, program: QemuProgram, vm: str, shape: GuestShape, image: Image) -> None:
        self._stage = stage
        self._program = program
        self._vm = vm
        self._shape = shape
        self._image = image

    @classmethod
    async def prepare(cls, stage: Stage, program: QemuProgram, vm: str, shape: GuestShape) -> QemuCasting:
        """Writes the guest's files into the stage's directory."""
        return cls(stage, program, vm, shape, await make_image(stage.root, shape))

    async def start(self, host: Host, api: Api, incoming: bool = False, backing: str = "") -> QemuGuest:
        """Returns once the daemon has adopted it. `incoming`: it waits for the guest; `backing` "": the shape's."""
        number, root = next(_NUMBERS), self._stage.root
        sockets = Sockets(host.directory / f"{number}.qmp", root / f"{number}.own")
        guest = self._shape
        shape = Shape(self._vm, guest.memory // MIB, guest.vcpus, backing or guest.backing, self._image)
        log: Path = root / f"{host.name}.{number}.qemu.log"
        argv = [*self._program.argv, *arguments(shape, sockets), *(WAITS if incoming else ())]
        process = await Process.start(f"{host.name} QEMU", argv, log, host.place.netns)
        admin = QemuAdmin(
            self._vm,
            await monitor_of(process, sockets.own),
            self._image,
            root,
            lambda gpa: api.report_error(self._vm, gpa),
        )
        made = QemuGuest(self._vm, host, process, admin)
        await self._stage.add(made, "incoming" if incoming else "running")
        return made
