"""Two domains of a libvirtd: vmferry moves the guest of one into the other, by a second monitor of each."""

from __future__ import annotations

import asyncio
import re
import sys
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
    <qemu:arg value='-qmp'/><qemu:arg value='unix:{monitor},server=on,wait=off'/>
  </qemu:commandline>
</domain>
"""
VMFERRY = Path(sys.executable).parent / "vmferry"
WAITING = ("qemu", "destination-command", "--vm", VM, "--libvirt", "-")


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

    async def start(self, host: Host, name: str) -> Console:
        """Returns once the daemon of the host has adopted it as `VM`."""
        console = Console(self._directory, name)
        values = {
            "name": name,
            "memory": linux.MEMORY_MIB,
            "kernel": self._image.kernel,
            "initramfs": self._image.initramfs,
            "line": linux.KERNEL_LINE,
            "emulator": self._emulator,
            "disk": self._disk,
            "console": console.log,
            "monitor": _monitor(host, name),
        }
        xml = DOMAIN.format(**{key: escape(str(value)) for key, value in values.items()})
        await self._create(host, name, xml)
        return console

    async def wait(self, host: Host, name: str, source: str, command: list[str]) -> Console:
        """Starts the domain that waits, made of the source's by a command. Both are domains of one libvirtd here: they
        differ in their names and paths.
        """
        console = Console(self._directory, name)
        xml = re.sub(r"\s*<uuid>.*</uuid>", "", await self._libvirt.virsh("dumpxml", "--migratable", source))
        here = {
            f"<name>{source}<": f"<name>{name}<",
            str(Console(self._directory, source).log): str(console.log),
            str(_monitor(self._hosts.pair.home, source)): str(_monitor(host, name)),
        }
        for old, new in here.items():
            xml = xml.replace(old, new)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate(xml.encode())
        assert process.returncode == 0
        await self._create(host, name, output.decode(), "--paused")
        return console

    async def _create(self, host: Host, name: str, xml: str, *how: str) -> None:
        path = self._directory / f"{name}.xml"
        path.write_text(xml)
        await self._libvirt.virsh("create", str(path), *how)
        api = self._hosts.pair.home_api if host is self._hosts.pair.home else self._hosts.pair.away_api
        await api.adopt_qemu(str(_monitor(host, name)), VM)
        state = machines_pb2.MACHINE_STATE_INCOMING if how else machines_pb2.MACHINE_STATE_RUNNING
        await self._hosts.knows(host, VM, state)


def _monitor(host: Host, name: str) -> Path:
    """Not among those that the daemon watches: it is adopted under the guest's name."""
    return monitors(host) / f"{name}.libvirt"


async def test_a_guest_moves_from_one_domain_of_libvirt_to_another(
    hosts: Hosts, qemu72: Qemu, image: LinuxImage, libvirt: Libvirt, tmp_path: Path
) -> None:
    pair, domains = hosts.pair, Domains(libvirt, hosts, qemu72.argv[0], image, tmp_path)
    source = await domains.start(pair.home, "web-a")
    before = await source.until(libvirt.process, lambda state: state.disk > 0, linux.BOOTS_S)
    command = [str(VMFERRY), "--api", pair.home.place.api, *WAITING]
    destination = await domains.wait(pair.away, "web-b", "web-a", command)
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
