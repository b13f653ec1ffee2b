"""The conditions of readiness, each tried for real: what /readyz and the health service answer by."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmferry.daemon.config import Config, Pager
from vmferry.daemon.cpu_list import parse_cpu_list
from vmferry.daemon.instance import HostUnfit, make_directory
from vmferry.ops.state import Check

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
UFFD_FEATURES = {"UFFD_FEATURE_THREAD_ID": 1 << 8, "UFFD_FEATURE_POISON": 1 << 14}
"""Features that pagers ask for (linux/userfaultfd.h)."""


@dataclass
class Listeners:
    """Ports as bound, by key; app.py fills it as it starts."""

    ports: dict[str, int] = field(default_factory=dict)


class HostReadiness:
    """Tries the conditions anew at each call; the blocking ones on a thread."""

    def __init__(self, config: Config, listeners: Listeners) -> None:
        self._config = config
        self._listeners = listeners

    async def checks(self) -> Sequence[Check]:
        host = await asyncio.to_thread(self._host_checks)
        return [*host, await self._vmm_socket(), *self._bound()]

    def _host_checks(self) -> list[Check]:
        return [
            _writable("store", self._config.state_dir),
            _writable("runtime_dir", self._config.runtime_dir),
            pager_check(self._config.pager.program),
            cpus_check(self._config.pager, online_cpus()),
            userfaultfd_check(),
        ]

    async def _vmm_socket(self) -> Check:
        """Only looked at, not connected to: a connection would be a VMM."""
        path = self._config.vmm_socket
        listening = await asyncio.to_thread(_listens, path)
        return Check("vmm_socket", listening, f"{path} {'listens' if listening else 'does not listen; see the log'}")

    def _bound(self) -> list[Check]:
        ports = self._listeners.ports
        return [
            Check(key, key in ports, f"port {ports[key]}" if key in ports else "not bound yet; see the log")
            for key in ("api", "peer")
        ]


def _writable(name: str, path: Path) -> Check:
    try:
        make_directory(path, name, 0o700)
    except HostUnfit as error:
        return Check(name, False, str(error))
    return Check(name, True, f"{path} is writable")


def _listens(path: Path) -> bool:
    """Whether a socket bound to `path` accepts connections: flag 0x10000 (SO_ACCEPTCON) in /proc/net/unix."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & 0x10000:
            return True
    return False


def find_program(program: str) -> Path | None:
    """A path as it is; a name on PATH or beside this Python."""
    beside = Path(sys.executable).parent / program
    found = shutil.which(program) or shutil.which(str(beside))
    return Path(found) if found else None


def pager_check(program: str) -> Check:
    found = find_program(program)
    if found is None:
        return Check("pager", False, f"no program {program!r}: install it, or set pager.program to its path")
    return Check("pager", True, str(found))


def online_cpus() -> frozenset[int]:
    """Documentation/admin-guide/cputopology.rst."""
    return parse_cpu_list(Path("/sys/devices/system/cpu/online").read_text().strip())


def cpus_check(pager: Pager, online: frozenset[int]) -> Check:
    """A pager that is told to run on CPUs that are not there would not start."""
    causes = []
    for key in ("page_path_cpus", "lane_cpus"):
        missing = parse_cpu_list(getattr(pager, key)) - online
        if missing:
            names = ", ".join(str(cpu) for cpu in sorted(missing))
            causes.append(f"pager.{key} names CPUs that are not online: {names}")
    return Check("pager_cpus", not causes, "; ".join(causes) or "those that are configured are online")


def userfaultfd_check() -> Check:
    """Opens a userfaultfd as a pager's VMM must and asks for the features."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        return Check("userfaultfd", False, f"no support for machine {os.uname().machine}")
    fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        cause = os.strerror(ctypes.get_errno())
        return Check(
            "userfaultfd", False, f"{cause}: give the daemon CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
        )
    try:
        request = ctypes.create_string_buffer(struct.pack("=QQQ", _UFFD_API, 0, 0))
        if libc.ioctl(fd, ctypes.c_ulong(_UFFDIO_API), request) != 0:
            return Check("userfaultfd", False, f"UFFDIO_API: {os.strerror(ctypes.get_errno())}")
        features = struct.unpack("=QQQ", request.raw[:24])[1]
    finally:
        os.close(fd)
    missing = [name for name, bit in UFFD_FEATURES.items() if not features & bit]
    if missing:
        return Check("userfaultfd", False, f"the kernel lacks {', '.join(missing)}: Linux 6.6 or later is needed")
    return Check("userfaultfd", True, "opens, with " + ", ".join(UFFD_FEATURES))
