"""The conditions of readiness, tried at each call, for /readyz and the health service."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vmferry.daemon.config import Config
from vmferry.daemon.cpu_list import parse_cpu_list
from vmferry.daemon.instance import HostUnfit, make_directory
from vmferry.model.names import Address
from vmferry.ops.state import Check
from vmferry.pager.settings import PagerTuning

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFDIO_API = 0xC018AA3F
_UFFD_API = 0xAA
UFFD_FEATURES = {"UFFD_FEATURE_THREAD_ID": 1 << 8, "UFFD_FEATURE_POISON": 1 << 14}
"""The features that pagers request (linux/userfaultfd.h)."""

CONNECT_S = 1.0
HOST_S = 5.0
"""The longest wait for the checks of the host."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a port that is bound to every address of the host answers."""


@dataclass
class Listeners:
    """The bound ports by key. app.py fills it at its start."""

    ports: dict[str, int] = field(default_factory=dict)


class HostReadiness:
    """Tries the conditions at each call, the blocking ones on one thread of its own: a disk that hangs takes no thread
    from the pagers, and does not keep the daemon from its end.
    """

    def __init__(self, config: Config, listeners: Listeners) -> None:
        self._config = config
        self._listeners = listeners
        self._trying: asyncio.Future[list[Check]] | None = None

    async def checks(self) -> Sequence[Check]:
        return [
            *await self._host_in_time(),
            *await asyncio.gather(self._port("api", self._config.api), self._port("peer", self._config.peer)),
        ]

    async def _host_in_time(self) -> list[Check]:
        """The findings of the thread. Callers at the same time share them, and a late thread is not tried again."""
        if self._trying is None or self._trying.done():
            loop = asyncio.get_running_loop()
            self._trying = loop.create_future()
            threading.Thread(target=self._try_host, args=(loop, self._trying), name="readiness", daemon=True).start()
        done, _ = await asyncio.wait({self._trying}, timeout=HOST_S)
        if done:
            return self._trying.result()
        return [Check("host", False, f"no answer within {HOST_S:g} s: the disk of state_dir or runtime_dir hangs")]

    def _try_host(self, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[list[Check]]) -> None:
        try:
            tell = partial(answer.set_result, self._host_checks())
        except Exception as error:  # noqa: BLE001 the caller gets it, whatever it is
            tell = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # The loop has ended.
            loop.call_soon_threadsafe(tell)

    def _host_checks(self) -> list[Check]:
        config = self._config
        return [
            _tried("store", lambda: _writable("store", config.state_dir)),
            _tried("runtime_dir", lambda: _writable("runtime_dir", config.runtime_dir)),
            _tried("pager", lambda: pager_check(config.pager.program)),
            _tried("pager_cpus", lambda: cpus_check(config.pager.tuning, online_cpus())),
            _tried("userfaultfd", userfaultfd_check),
            _tried("vmm_socket", lambda: vmm_socket_check(config.vmm_socket)),
        ]

    async def _port(self, key: str, address: Address) -> Check:
        """Connects as a client would. The port of an ended server is closed."""
        port = self._listeners.ports.get(key)
        if port is None:
            return Check(key, False, "not bound yet; see the log")
        host = _LOOPBACK.get(address.host, address.host)
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            return Check(key, False, f"port {port} does not answer ({error or 'no answer in time'}); see the log")
        writer.close()
        return Check(key, True, f"port {port}")


def _tried(name: str, check: Callable[[], Check]) -> Check:
    """A check that cannot be made is a condition that does not hold. It never ends the daemon."""
    try:
        return check()
    except (OSError, ValueError) as error:
        return Check(name, False, f"cannot be checked: {error}")


def vmm_socket_check(path: Path) -> Check:
    """Looks at the socket and does not connect: a connection would be a VMM."""
    listening = _listens(path)
    return Check("vmm_socket", listening, f"{path} {'listens' if listening else 'does not listen; see the log'}")


def _writable(name: str, path: Path) -> Check:
    try:
        make_directory(path, _KEY_OF.get(name, name), 0o700)
    except HostUnfit as error:
        return Check(name, False, str(error))
    return Check(name, True, f"{path} is writable")


_KEY_OF = {"store": "state_dir"}
"""The keys of the configuration that are named otherwise than their checks."""


def _listens(path: Path) -> bool:
    """Whether a socket bound to `path` accepts connections: flag 0x10000 (SO_ACCEPTCON) in /proc/net/unix.

    The file is bytes: any user may bind an abstract name that is not UTF-8, and a name may hold a newline.
    """
    wanted = os.fsencode(path)
    for line in Path("/proc/net/unix").read_bytes().split(b"\n")[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & 0x10000:
            return True
    return False


def find_program(program: str) -> Path | None:
    """The program: a path as it is, or a name on PATH or next to this Python."""
    beside = Path(sys.executable).parent / program
    found = shutil.which(program) or shutil.which(str(beside))
    return Path(found) if found else None


def pager_check(program: str) -> Check:
    found = find_program(program)
    if found is None:
        return Check("pager", False, f"no program {program!r}: install it, or set pager.program to its path")
    return Check("pager", True, str(found))


def online_cpus() -> frozenset[int]:
    """The online CPUs (Documentation/admin-guide/cputopology.rst)."""
    return parse_cpu_list(Path("/sys/devices/system/cpu/online").read_text().strip())


def cpus_check(tuning: PagerTuning, online: frozenset[int]) -> Check:
    """Checks that the configured CPUs are online. Otherwise a pager would not start."""
    causes = []
    for key in ("page_path_cpus", "lane_cpus"):
        missing = parse_cpu_list(getattr(tuning, key) or "") - online
        if missing:
            names = ", ".join(str(cpu) for cpu in sorted(missing))
            causes.append(f"pager.{key} names CPUs that are not online: {names}")
    return Check("pager_cpus", not causes, "; ".join(causes) or "those that are configured are online")


def userfaultfd_check() -> Check:
    """Opens a userfaultfd as a pager's VMM does, and requests the features."""
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
