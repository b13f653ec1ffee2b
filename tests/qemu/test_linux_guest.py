"""A stock Linux with disk, network, balloon, serial line, clock and random numbers: an undone move, a move, a reboot.

It runs by TCG: real devices and a real kernel, on any machine.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.linux_guest import guest as linux
from tests.support.linux_guest.guest import Console, LinuxVm
from tests.support.linux_guest.image import LinuxImage, build, why_not
from tests.support.linux_guest.wire import Wire
from tests.support.qemu import Hosts, Qemu
from tests.support.scenario.harness import ended, reaches, unique
from vmferry.demo.patience import patient
from vmferry.demo.stage import Host, until
from vmferry.errors import VmferryError
from vmferry.units import MIB
from vmferry.v1 import migrations_pb2 as mg

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

WAITS = ("-S", "-incoming", "defer")
SLOW_PUSH = 1 << 20
"""Bytes a second: pages are missing as long as the test needs it."""
CLOCK_S = patient(5.0)
"""Between the guest's clock and this machine's, with the time that a line of the guest needs to get here."""
BALLOON_MIB = 128
MOVE_S = patient(120.0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> LinuxImage:
    if why := why_not():
        pytest.skip(why)
    return build(tmp_path_factory.mktemp("linux"))


@pytest_asyncio.fixture(loop_scope="module")
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    made = Wire(tmp_path)
    yield made
    made.close()


class Guest:
    """Starts the QEMUs of one Linux guest. `name` of a QEMU: "a" has the guest first."""

    def __init__(self, hosts: Hosts, qemu: Qemu, image: LinuxImage, wire: Wire, directory: Path) -> None:
        self.vm = unique(qemu.name)
        self._hosts = hosts
        self._qemu = qemu
        self._image = image
        self._wire = wire
        self._directory = directory
        self._disk = directory / "disk"
        self._disk.touch()
        with self._disk.open("r+b") as file:
            file.truncate(4 * MIB)

    async def start(self, host: Host, name: str, *more: str) -> LinuxVm:
        console = Console(self._directory, name)
        memory = f"memory-backend-memfd,id=ram,share=on,size={linux.MEMORY_MIB}M"
        made = await self._hosts.start_with(
            host,
            self._qemu,
            self.vm,
            [
                *("-machine", "pc-i440fx-7.2,accel=tcg,memory-backend=ram", "-cpu", "max", "-smp", "1"),
                *("-m", str(linux.MEMORY_MIB), "-object", memory),
                *linux.options(self._image, self._disk, self._wire, console, name),
                *more,
            ],
        )
        return LinuxVm(name, made.process, made.monitor, console)


async def balloon(vm: LinuxVm, mib: int) -> None:
    """Waits until the guest has that much memory."""
    await vm.monitor.ask("balloon", patient(10.0), {"value": mib * MIB})

    async def done() -> bool:
        actual = (await vm.monitor.ask("query-balloon", patient(10.0)))["actual"]
        return bool(actual == mib * MIB)

    await until(f"the balloon to leave {mib} MiB", done, MOVE_S)


@pytest.fixture(params=["7.2", "10.0"])
def qemu(request: pytest.FixtureRequest) -> Qemu:
    found: Qemu = request.getfixturevalue({"7.2": "qemu72", "10.0": "qemu10"}[request.param])
    return found


async def test_a_linux_guest_is_well_after_an_undone_move_a_move_and_a_reboot(
    hosts: Hosts, qemu: Qemu, image: LinuxImage, wire: Wire, tmp_path: Path
) -> None:
    guest, pair = Guest(hosts, qemu, image, wire, tmp_path), hosts.pair
    source = await guest.start(pair.home, "a", *linux.BALLOON)
    await source.console.until(source.process, lambda state: state.disk > 0, linux.BOOTS_S)
    await wire.ping("a")

    # The destination lacks a device: it cannot load the state, and the guest continues at home.
    wrong = await guest.start(pair.away, "wrong", *WAITS)
    await pair.home_api.create(f"{guest.vm}-undone", guest.vm, str(pair.away.place.peer))
    undone = await ended(pair.home_api, f"{guest.vm}-undone", MOVE_S)
    assert undone.phase in (mg.PHASE_FAILED, mg.PHASE_CANCELLED), undone
    assert await wrong.process.ended(patient(20.0))
    await wire.announced("a", 0)
    await source.lives()
    await wire.ping("a")

    destination = await guest.start(pair.away, "b", *linux.BALLOON, *WAITS)
    before = source.console.states()[-1]
    await pair.home_api.create(guest.vm, guest.vm, str(pair.away.place.peer), SLOW_PUSH)
    await reaches(pair.home_api, guest.vm, mg.PHASE_POSTCOPY, MOVE_S)
    arrived = await destination.lives()
    assert arrived.boot == before.boot and arrived.touched > before.touched
    await wire.announced("b", 0)
    await wire.ping("b")
    with pytest.raises(VmferryError, match="lock"):  # the disk is the destination's
        await source.monitor.ask("cont", patient(10.0))
    await destination.console.hears("hello")
    await balloon(destination, BALLOON_MIB)
    progress = (await pair.home_api.migration(guest.vm)).progress
    assert progress.discarded > 0, "the balloon has given up pages that had not come"
    await balloon(destination, linux.MEMORY_MIB)
    await pair.home_api.set_push_limit(guest.vm, 0)
    last = await ended(pair.home_api, guest.vm, MOVE_S)
    assert last.phase == mg.PHASE_COMPLETED, f"{last.reason}\n{destination.process.last_words()}"
    moved = await destination.lives()
    assert moved.disk > arrived.disk and moved.random > arrived.random
    assert abs(moved.clock - time.time()) < CLOCK_S and abs(moved.rtc - time.time()) < CLOCK_S
    assert await source.process.ended(patient(20.0))

    await destination.console.hears("reboot")
    again = await destination.console.until(
        destination.process, lambda state: state.boot != moved.boot and state.disk > 0, linux.BOOTS_S
    )
    assert again.well, again
    await wire.ping("b")
    await destination.lives()
