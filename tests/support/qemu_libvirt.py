"""A libvirtd of the test's own: its sockets, state and domains are in the test's directory."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from vmferry.demo.patience import patient
from vmferry.demo.processes import Process
from vmferry.demo.stage import StageError, until

PROGRAM = Path("/usr/sbin/libvirtd")
DRIVER = Path("/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")
STARTS_S = patient(60.0)
ANSWER_S = patient(60.0)
_HIDDEN = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt")
"""Folders of the host's libvirt. In the mount namespace of ours, folders of the test's lie over them."""
_USER = "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"
_GROUP = "libvirt-qemu:x:64055:\n"
"""libvirtd looks its default user up, also where another is configured. Debian makes it with the system's daemon."""
_DAEMON = """unix_sock_dir = "{sockets}"
auth_unix_rw = "none"
log_outputs = "2:stderr"
"""
_QEMU = """user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


def why_not() -> str:
    """Why it cannot run here; "" if it may."""
    missing = [str(path) for path in (PROGRAM, DRIVER) if not path.exists()]
    missing += [name for name in ("virsh", "unshare") if shutil.which(name) is None]
    if missing:
        return (
            f"{', '.join(missing)} missing: apt-get install libvirt-daemon libvirt-clients libvirt-daemon-driver-qemu"
        )
    return "" if os.geteuid() == 0 else "libvirtd of the system needs root"


class Libvirt:
    """Made by `start`."""

    def __init__(self, process: Process, sockets: Path) -> None:
        self.process = process
        self._uri = f"qemu+unix:///system?socket={sockets}/libvirt-sock"

    @classmethod
    async def start(cls, directory: Path) -> Libvirt:
        """Returns once it answers. Raises: StageError."""
        own = {path: directory / path.strip("/").replace("/", "-") for path in _HIDDEN}
        sockets = directory / "sockets"
        for folder in (sockets, *own.values()):
            folder.mkdir(parents=True)
        (directory / "libvirtd.conf").write_text(_DAEMON.format(sockets=sockets))
        (own["/etc/libvirt"] / "qemu.conf").write_text(_QEMU)
        covered = [f"mkdir -p {path} && mount --bind {folder} {path}" for path, folder in own.items()]
        for path, line in ((Path("/etc/passwd"), _USER), (Path("/etc/group"), _GROUP)):
            (directory / path.name).write_text(path.read_text() + line)
            covered.append(f"mount --bind {directory / path.name} {path}")
        run = f"exec {PROGRAM} --config {directory}/libvirtd.conf --pid-file {directory}/pid"
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", " && ".join([*covered, run])]
        made = cls(await Process.start("libvirtd", argv, directory / "libvirtd.log"), sockets)
        try:
            await until("libvirtd to answer", made._answers, STARTS_S)
        except BaseException:
            await made.process.stop()
            raise
        return made

    async def virsh(self, *words: str) -> str:
        """The output. Raises: StageError with the complaint."""
        process = await asyncio.create_subprocess_exec(
            *("virsh", "--quiet", "--connect", self._uri, *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(ANSWER_S):
            output, complaint = await process.communicate()
        if process.returncode:
            raise StageError(f"virsh {' '.join(words)}: {complaint.decode().strip()}\n{self.process.last_words()}")
        return output.decode().strip()

    async def _answers(self) -> bool:
        if not self.process.alive:
            raise StageError(f"libvirtd ended:\n{self.process.last_words()}")
        try:
            await self.virsh("list")
        except StageError:
            return False
        return True

    async def stop(self) -> None:
        """Ends the domains too."""
        for name in (await self.virsh("list", "--name")).split():
            await self.virsh("destroy", name)
        await self.process.stop()
