"""Stock QEMUs on this machine, with the payload guest, and two daemons that adopt them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.scenario.harness import Pair, two_hosts
from vmferry.client.refusal import ApiError
from vmferry.demo.options import GuestShape
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process
from vmferry.demo.qemu.image import Image, report_of_dump
from vmferry.demo.qemu.image import make_image as image_of
from vmferry.demo.qemu.program import QemuProgram
from vmferry.demo.qemu.vm import CPU, monitor_of
from vmferry.demo.stage import Host, StageError, until
from vmferry.units import MIB
from vmferry.v1 import machines_pb2
from vmferry.vmm.qemu.monitor import Monitor

Qemu = QemuProgram
MACHINE = "accel=kvm,hpet=off,vmport=off,smm=off"
ANSWER_S = patient(20.0)
GUEST_S = patient(60.0)
MEMORY_MIB = 96
PAYLOAD_MIB = 16
"""Tables and report of the guest: no page of these goes bad in a test."""


async def make_image(directory: Path, memory_mib: int, vcpus: int, workload: str) -> Image:
    shape = GuestShape(memory=memory_mib * MIB, vcpus=vcpus, workload=workload, write_percent=20)
    return await image_of(directory, shape)


@dataclass(slots=True)
class Vm:
    """A QEMU that runs, the daemon's monitor of it, and the test's own."""

    name: str
    process: Process
    adopted: Path
    monitor: Monitor
    directory: Path

    async def ask(self, command: str, **arguments: object) -> Any:
        return await self.monitor.ask(command, ANSWER_S, arguments)

    async def status(self) -> str:
        return str((await self.ask("query-status"))["status"])

    async def report(self, image: Image) -> dict[str, Any]:
        """The guest's report, out of a copy of its first memory."""
        dump = self.directory / f"{self.name}-{self.process.pid}.dump"
        await self.ask("pmemsave", val=0, size=image.dump_bytes, filename=str(dump))
        return await report_of_dump(dump)

    async def warm(self, image: Image) -> dict[str, Any]:
        """Waits until the guest has been through all of its memory."""
        report: dict[str, Any] = {}

        async def done() -> bool:
            nonlocal report
            report = await self.report(image)
            return bool(report["passes"] >= 1)

        await until(f"{self.name} to go through its memory", done, GUEST_S)
        return report

    async def goes_on(self, image: Image) -> dict[str, Any]:
        """Waits until the guest has touched more; the report that shows it."""
        before = report = await self.report(image)

        async def more() -> bool:
            nonlocal report
            report = await self.report(image)
            return bool(report["touches"] > before["touches"])

        await until(f"{self.name} to go on", more, GUEST_S)
        return report


@dataclass(frozen=True, slots=True)
class Hosts:
    """Two daemons that watch a directory of monitors each; QEMUs end with `guests`."""

    pair: Pair
    guests: AsyncExitStack

    async def start(
        self, host: Host, qemu: Qemu, vm: str, memory: list[str], image: Image, *options: str, kind: str = "qmp"
    ) -> Vm:
        """Starts a QEMU of `vm` with the payload guest."""
        words = ["-cpu", CPU, "-smp", "1", *memory, *image.options, *options]
        return await self.start_with(host, qemu, vm, words, kind)

    async def start_with(self, host: Host, qemu: Qemu, vm: str, options: list[str], kind: str = "qmp") -> Vm:
        """Starts a QEMU of `vm` on one of the hosts; returns once the daemon knows it. `kind`: the ending of its
        monitor's name; the daemon watches for "qmp"."""
        waits = "-incoming" in options
        vm_and_side = f"{vm}-{'b' if waits else 'a'}"
        adopted, own = monitors(host) / f"{vm_and_side}.{kind}", monitors(host) / f"{vm_and_side}.test"
        argv = [
            *(*qemu.argv, "-name", f"{vm},debug-threads=on", "-nodefaults", "-display", "none"),
            *("-qmp", f"unix:{own},server=on,wait=off", "-qmp", f"unix:{adopted},server=on,wait=off"),
            *options,
        ]
        process = await Process.start(f"{host.name} {vm}", argv, monitors(host) / f"{vm}.log", host.place.netns)
        self.guests.push_async_callback(process.kill)

        monitor = await monitor_of(process, own)
        self.guests.push_async_callback(monitor.close)
        state = machines_pb2.MACHINE_STATE_INCOMING if waits else machines_pb2.MACHINE_STATE_RUNNING
        if kind == "qmp":
            await self.knows(host, vm, state)
        return Vm(vm, process, adopted, monitor, monitors(host))

    async def knows(self, host: Host, vm: str, state: int) -> None:
        api = self.pair.home_api if host is self.pair.home else self.pair.away_api

        async def known() -> bool:
            try:
                return bool((await api.machine(vm)).state == state)
            except ApiError:
                return False

        try:
            await until(f"{host.name} to have {vm} in state {state}", known, GUEST_S)
        except StageError as error:
            raise AssertionError(f"{error}\n{host.process.last_words() if host.process else ''}") from error


def monitors(host: Host) -> Path:
    return host.directory / "qemu"


@asynccontextmanager
async def qemu_hosts() -> AsyncIterator[Hosts]:
    """Two daemons on loopback, each with `[qemu] monitors`."""
    async with two_hosts({"qemu": ""}, {"qemu": ""}) as pair:
        for host in (pair.home, pair.away):
            assert host.process is not None
            await host.process.stop()
            monitors(host).mkdir()
            host.write_config(qemu=f"monitors = [{json.dumps(str(monitors(host) / '*.qmp'))}]")
            await host.start()
        async with AsyncExitStack() as guests:
            yield Hosts(pair, guests)


def memory_options(kind: str, machine: str, directory: Path, name: str, mib: int = MEMORY_MIB) -> list[str]:
    """Guest memory of a kind; `default`: without a memory option."""
    backends = {
        "anonymous": "memory-backend-ram",
        "memfd": "memory-backend-memfd,share=on",
        "memfd-prealloc": "memory-backend-memfd,share=on,prealloc=on",
        "anonymous-prealloc": "memory-backend-ram,prealloc=on",
        "tmpfs": f"memory-backend-file,share=on,mem-path={directory}/{name}.ram",
        "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
    }
    if kind == "default":
        return ["-machine", f"{machine},{MACHINE}", "-m", str(mib)]
    return [
        *("-machine", f"{machine},{MACHINE},memory-backend=ram", "-m", str(mib)),
        *("-object", f"{backends[kind]},id=ram,size={mib}M"),
    ]


def bad_pages(count: int, mib: int = MEMORY_MIB) -> list[int]:
    """GPAs of pages that go bad, apart from each other."""
    step = (mib - PAYLOAD_MIB) * MIB // count
    return [PAYLOAD_MIB * MIB + number * step + (number << 12) for number in range(count)]
