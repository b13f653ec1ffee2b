"""Two domains of a libvirtd: vmferry moves the guest of one into the other, by a second monitor of each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import pytest_asyncio

from tests.support import qemu_libvirt
from tests.support.linux_guest import guest as linux
from tests.support.linux_guest.guest import Console
from tests.support.linux_guest.image import LinuxImage, build, why_not
from tests.support.qemu import Hosts, Qemu, monitors
from tests.support.qemu_libvirt import Libvirt
from tests.support.scenario.harness import ended
from vmferry.demo.patience import patient
from vmferry.demo.stage import Host, until
from vmferry.units import MIB
from vmferry.v1 import machines_pb2
from vmferry.v1 import migrations_pb2 as mg

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

VM = "libvirt-web"
MOVE_S = patient(120.0)
DOMAIN = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>{line}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{console}'/><target port='0'/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'/>
    <video><model type='none'/></video>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{monitor},server=on,wait=off'/>{waits}
  </qemu:commandline>
</domain>
"""
WAITS = "<qemu:arg value='-incoming'/><qemu:arg value='defer'/>"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> LinuxImage:
    if why := why_not():
        pytest.skip(why)
    return build(tmp_path_factory.mktemp("linux"))


@pytest_asyncio.fixture(loop_scope="module")
async def libvirt(tmp_path: Path) -> AsyncIterator[Libvirt]:
    if why := qemu_libvirt.why_not():
        pytest.skip(why)
    made = await Libvirt.start(tmp_path / "lv")
    yield made
    await made.stop()


class Domains:
    """Starts the domains of one guest, with a disk that they share."""

    def __init__(self, libvirt: Libvirt, hosts: Hosts, emulator: str, image: LinuxImage, directory: Path) -> None:
        self._libvirt = libvirt
        self._hosts = hosts
        self._emulator = emulator
        self._image = image
        self._directory = directory
        self._disk = directory / "disk"
        with self._disk.open("wb") as file:
            file.truncate(4 * MIB)

    async def start(self, host: Host, name: str, waits: bool = False) -> Console:
        """Returns once the daemon of the host has adopted it as `VM`."""
        console = Console(self._directory, name)
        monitor = monitors(host) / f"{name}.libvirt"
        values = {
            "name": name,
            "memory": linux.MEMORY_MIB,
            "kernel": self._image.kernel,
            "initramfs": self._image.initramfs,
            "line": linux.KERNEL_LINE,
            "emulator": self._emulator,
            "disk": self._disk,
            "console": console.log,
            "monitor": monitor,
        }
        text = {key: escape(str(value)) for key, value in values.items()}
        path = self._directory / f"{name}.xml"
        path.write_text(DOMAIN.format(**text, waits=WAITS if waits else ""))
        await self._libvirt.virsh("create", str(path), *(["--paused"] if waits else []))
        api = self._hosts.pair.home_api if host is self._hosts.pair.home else self._hosts.pair.away_api
        await api.adopt_qemu(str(monitor), VM)
        state = machines_pb2.MACHINE_STATE_INCOMING if waits else machines_pb2.MACHINE_STATE_RUNNING
        await self._hosts.knows(host, VM, state)
        return console


async def test_a_guest_moves_from_one_domain_of_libvirt_to_another(
    hosts: Hosts, qemu72: Qemu, image: LinuxImage, libvirt: Libvirt, tmp_path: Path
) -> None:
    pair, domains = hosts.pair, Domains(libvirt, hosts, qemu72.argv[0], image, tmp_path)
    source = await domains.start(pair.home, "web-a")
    before = await source.until(libvirt.process, lambda state: state.disk > 0, linux.BOOTS_S)
    destination = await domains.start(pair.away, "web-b", waits=True)
    check = await pair.home_api.check_qemu(VM, (await pair.away_api.check_qemu(VM)).profile)
    assert not [one.fact for one in check.findings if "TCG" not in one.remedy]
    await pair.home_api.create(VM, VM, str(pair.away.place.peer))
    last = await ended(pair.home_api, VM, MOVE_S)
    assert last.phase == mg.PHASE_COMPLETED, last.reason
    after = await destination.until(libvirt.process, lambda state: state.disk > before.disk)
    assert after.well and after.boot == before.boot and after.touched > before.touched

    async def as_libvirt_sees_it() -> bool:
        names = (await libvirt.virsh("list", "--name")).split()
        return names == ["web-b"] and await libvirt.virsh("domstate", "web-b") == "running"

    await until("libvirt to see the source gone and the destination running", as_libvirt_sees_it, MOVE_S)
