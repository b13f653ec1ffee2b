"""A round of QEMU: two processes of qemu-system-x86_64, the same guest, postcopy at once, over TCP on loopback."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from vmferry.demo.network import loopback_places
from vmferry.demo.processes import Process
from vmferry.demo.qemu.guest import movable
from vmferry.demo.qemu.image import make_image, report_of_dump
from vmferry.demo.qemu.program import PROGRAM, QemuProgram, chosen_qemu, installed_qemu
from vmferry.demo.qemu.vm import CPU
from vmferry_bench.figures import quantiles
from vmferry_bench.native import BenchError
from vmferry_bench.ours import guest_shape
from vmferry_bench.plan import Turn
from vmferry_bench.processes import CpuWatch, warm_memory
from vmferry_bench.qmp import Qmp
from vmferry_bench.shape import ADOPTED, ITSELF, PLAIN, TRACED, Round, Shape, is_warm
from vmferry_bench.trace import EVENTS, waits_us

WARM_S = 90.0
UNLIMITED = 1 << 40
"""Bytes a second: QEMU's limit of the phase before postcopy, out of the way."""
AFTER_S = 0.05
"""Between the last page and the reading of the report: for touches under way to end."""


def program_of(side: str) -> QemuProgram | None:
    """The distribution's own, or the newest one where vmferry moves the same."""
    return chosen_qemu("") if side in (ADOPTED, ITSELF) else installed_qemu()


def usable(side: str, shape: Shape) -> bool:
    """Whether the side's QEMU is there, and vmferry can move it with such memory."""
    program = program_of(side)
    if program is None or side not in (ADOPTED, ITSELF):
        return program is not None
    return movable(program, guest_shape(shape)) == guest_shape(shape)


class Vm:
    """One QEMU."""

    def __init__(self, name: str, program: QemuProgram, directory: Path) -> None:
        self.name = name
        self._program = program
        self.qmp = Qmp(name)
        self._directory = directory
        self.process: Process | None = None

    async def start(self, shape: Shape, image: list[str], *more: str) -> None:
        kind = {"anonymous": "memory-backend-ram", "memfd": "memory-backend-memfd,share=on"}[shape.backing]
        socket = self._directory / f"{self.name}.qmp"
        argv = [
            *(*self._program.argv, "-name", f"{self.name},debug-threads=on", "-cpu", CPU, "-smp", str(shape.vcpus)),
            *("-machine", "pc,accel=kvm,hpet=off,vmport=off,smm=off,memory-backend=ram", "-m", str(shape.memory_mib)),
            *("-object", f"{kind},id=ram,size={shape.memory_mib}M"),
            *("-nodefaults", "-display", "none", "-vga", "none", "-qmp", f"unix:{socket},server=on,wait=off"),
            *image,
            *more,
        ]
        self.process = await Process.start(self.name, argv, self._directory / f"{self.name}.log")
        try:
            await self.qmp.connect(socket)
        except TimeoutError:
            raise BenchError(f"QEMU does not come up: {self.process.last_words()}") from None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    async def report(self, size: int) -> dict[str, Any]:
        """The guest's report, out of a copy of its first memory that QEMU writes."""
        dump = self._directory / f"{self.name}.dump"
        await self.qmp.ask("pmemsave", val=0, size=size, filename=str(dump))
        return await report_of_dump(dump)

    async def end(self) -> None:
        await self.qmp.close()
        if self.process is not None:
            await self.process.kill()


async def _prepare(source: Vm, destination: Vm, preempt: bool, push_bytes_per_s: int) -> str:
    """Sets both up to migrate; returns where to. `push_bytes_per_s` 0: no limit."""
    wanted = {"postcopy-ram": True, "postcopy-preempt": preempt, "postcopy-blocktime": True, "events": True}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    for vm in (source, destination):
        await vm.qmp.ask("migrate-set-capabilities", capabilities=capabilities)
        limits = {"max-bandwidth": UNLIMITED, "max-postcopy-bandwidth": push_bytes_per_s}
        await vm.qmp.ask("migrate-set-parameters", **limits)
    uri = f"tcp:127.0.0.1:{loopback_places(1)[0].first_page_port}"
    await destination.qmp.ask("migrate-incoming", uri=uri)
    return uri


def _tracing(log: Path) -> list[str]:
    events = [word for event in EVENTS for word in ("-trace", f"enable={event}")]
    return [*events, "-msg", "timestamp=on", "-D", str(log)]


async def _until_warm(vm: Vm, shape: Shape, size: int) -> None:
    end = time.monotonic() + WARM_S
    while not is_warm(shape, await vm.report(size)):
        if time.monotonic() > end:
            raise BenchError(f"the guest in QEMU has not been through its memory within {WARM_S:g} s")
        await asyncio.sleep(0.2)


async def move(side: str, shape: Shape, number: int) -> Round:
    """One round."""
    program = program_of(side)
    if program is None:
        raise BenchError(f"{PROGRAM} is not installed")
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as name:
        directory = Path(name)
        made = await make_image(directory, guest_shape(shape))
        image, size = list(made.options), made.dump_bytes
        source, destination = (Vm(name, program, directory) for name in ("source", "destination"))
        try:
            await source.start(shape, image)
            log = directory / "trace"
            await destination.start(shape, image, "-incoming", "defer", *(_tracing(log) if side == TRACED else ()))
            uri = await _prepare(source, destination, side != PLAIN, shape.push_mib_s << 20)
            await _until_warm(source, shape, size)
            await warm_memory(shape.memory_mib << 20)
            one = await _measure(Turn(side, shape, number), source, destination, uri, size)
            if side == TRACED:
                with log.open() as lines:
                    one.handler_us = quantiles(waits_us(lines)) or None
            return one
        finally:
            await destination.end()
            await source.end()


async def _measure(turn: Turn, source: Vm, destination: Vm, uri: str, size: int) -> Round:
    watch = CpuWatch([source.pid, destination.pid], [])
    watch.start()
    asked_at = time.time()
    await source.qmp.ask("migrate", uri=uri)
    await source.qmp.ask("migrate-start-postcopy")
    last_page_at = await destination.qmp.until("MIGRATION", "completed")
    machinery, vcpu, programs = watch.stop()
    await source.qmp.until("MIGRATION", "completed")
    await asyncio.sleep(AFTER_S)
    said, told = await destination.report(size), await source.qmp.ask("query-migrate")
    here = await destination.qmp.ask("query-migrate")
    stopped_at, resumed_at = source.qmp.when("STOP") or 0.0, destination.qmp.when("RESUME") or 0.0
    return Round(
        side=turn.side,
        shape=turn.shape,
        number=turn.number,
        buckets=said["first_touch_buckets"],
        longest_us=said["first_touch_us"]["max"],
        blackout_guest_s=said["blackout_us"] / 1e6,
        blackout_vmm_s=resumed_at - stopped_at,
        total_s=last_page_at - asked_at,
        postcopy_s=last_page_at - resumed_at,
        postcopy_bytes=told["ram"]["postcopy-bytes"],
        machinery_cpu_s=machinery,
        vcpu_cpu_s=vcpu,
        programs_cpu_s=programs,
        wrong_bytes=said["wrong_bytes"],
        faults=said["fatal"] or "",
        vmm_blocked_s=sum(here.get("postcopy-vcpu-blocktime", [])) / 1e3,
    )
