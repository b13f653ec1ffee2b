"""Stock QEMUs on this machine, with the payload guest, and two daemons that adopt them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry_bench import native

from tests.support.scenario.harness import Pair, two_hosts
from vmferry.client.refusal import ApiError
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process
from vmferry.demo.stage import Host, StageError, until
from vmferry.errors import Reason, VmferryError
from vmferry.units import MIB
from vmferry.v1 import machines_pb2
from vmferry.vmm.qemu.monitor import Monitor

NEWER = Path(__file__).parents[2] / ".venv" / "qemu"
"""Where deploy/debian/newer-qemu unpacks it."""
CPU = "host,-arch-capabilities"
"""MSR 0x10a is left out: KVM on AMD names bits of it that it then refuses to set. The guest never reads it."""
MACHINE = "accel=kvm,hpet=off,vmport=off,smm=off"
ANSWER_S = patient(20.0)
GUEST_S = patient(60.0)
MEMORY_MIB = 96
PAYLOAD_MIB = 16
"""Tables and report of the guest: no page of these goes bad in a test."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU program; `version` is its major and minor number."""

    version: str
    argv: tuple[str, ...]


def installed() -> Qemu | None:
    """Debian's own."""
    found = shutil.which("qemu-system-x86_64")
    return Qemu("7.2", (found,)) if found else None


def newer() -> Qemu | None:
    """The one that deploy/debian/newer-qemu has unpacked."""
    program, data = NEWER / "usr/bin/qemu-system-x86_64", NEWER / "usr/share/qemu"
    if not program.exists():
        return None
    return Qemu("10.0", (str(program), *("-L", str(data)), *("-L", "/usr/share/seabios"), *("-L", "/usr/share/qemu")))


@dataclass(frozen=True, slots=True)
class Image:
    """The payload guest as QEMU boots it."""

    options: tuple[str, ...]
    dump_bytes: int


async def make_image(directory: Path, memory_mib: int, vcpus: int, workload: str) -> Image:
    shape = {"memory-mib": memory_mib, "vcpus": vcpus, "workload": workload, "write-percent": 20, "seed": 1}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    made = await native.native("image", str(directory), *words)
    return Image(tuple(made["options"]), int(made["dump_bytes"]))


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
        return await native.native("report", str(dump))

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
        """Starts a QEMU of `vm` on one of the hosts; returns once the daemon knows it. `kind`: the ending of its
        monitor's name; the daemon watches for "qmp"."""
        waits = "-incoming" in options
        vm_and_side = f"{vm}-{'b' if waits else 'a'}"
        adopted, own = monitors(host) / f"{vm_and_side}.{kind}", monitors(host) / f"{vm_and_side}.test"
        argv = [
            *(*qemu.argv, "-name", f"{vm},debug-threads=on", "-nodefaults", "-display", "none"),
            *("-qmp", f"unix:{own},server=on,wait=off", "-qmp", f"unix:{adopted},server=on,wait=off"),
            *("-cpu", CPU, "-smp", "1", *memory, *image.options, *options),
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


async def monitor_of(process: Process, path: Path) -> Monitor:
    """The test's monitor, as soon as QEMU listens there."""
    while True:
        assert process.alive, process.last_words()
        try:
            return await Monitor.connect(path, ANSWER_S)
        except VmferryError as error:
            if error.reason is not Reason.VMM_GONE:
                raise
        await asyncio.sleep(0.02)


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
