"""Pager processes: `ports.Pagers`. A pager runs in a session of its own and outlives the daemon that started it.

```
<runtime_dir>/vms/<key>/    pager.sock   control; a restarted daemon finds the pager by it
                            memory.sock  for the VMM
                            pages        the page table (destination)
                            pager.log    standard error of the pager
                            vm           name of the VM
```

A process is killed only if the kernel names it at that moment as the listener of this directory's `pager.sock`
(SO_PEERCRED). A pidfd guards against reuse of the process id.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.model.pager import PagerHealth
from vmferry.pager.client import GrpcPager
from vmferry.pager.directory import CONTROL_SOCKET, VMS, directory_of
from vmferry.pager.health import ProcessHealth
from vmferry.pager.settings import PagerSettings

log = structlog.get_logger()

STARTED = "pager.started"
FOUND = "pager.found"
KILLED = "pager.killed"
ENDED = "pager.ended"
REMOVED = "pager.removed"

KEY = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,126}")
START_S = 10.0
STOP_S = 5.0
POLL_S = 0.02
FIND_S = 5.0
LOG_LINES = 20
LOG_TAIL_BYTES = 16 * 1024


class PagerProcesses:
    """Starts, finds and removes the pagers of this host."""

    def __init__(
        self, runtime_dir: Path, program: str = "vmferry-pager", settings: PagerSettings | None = None
    ) -> None:
        self._runtime_dir = runtime_dir
        self._root = runtime_dir / VMS
        self._program = program
        self._settings = settings or PagerSettings()
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._pagers: dict[str, GrpcPager] = {}
        self._watched: set[int] = set()
        self._health: dict[str, ProcessHealth] = {}

    async def start(self, key: str, vm: str, source: bool) -> GrpcPager:
        """Returns the pager that runs under this key, if there is one."""
        directory = self._directory(key)
        running = await self.find(key)
        if running is not None:
            return running
        program = locate(self._program)
        _clear(directory)
        directory.mkdir(parents=True, mode=0o700)
        (directory / "vm").write_text(vm)
        role = "source" if source else "destination"
        command = [program, "--runtime-dir", str(directory), "--vm", vm, "--role", role]
        command += self._settings.tuning.options()
        child = await _spawned(command, directory / "pager.log")
        self._children[key] = child
        self._reap_when_it_ends(key, child)
        pager = GrpcPager(directory, vm, self._settings)
        try:
            await self._until_it_answers(child, pager, directory)
        except BaseException:
            await pager.close()
            await _kill(child)
            raise
        self._pagers[key] = pager
        self._health[key] = ProcessHealth(child.pid, child)
        log.info(STARTED, key=key, vm=vm, pid=child.pid)
        return pager

    async def find(self, key: str) -> GrpcPager | None:
        directory = self._directory(key)
        listener = await asyncio.to_thread(_listener, directory / CONTROL_SOCKET)
        if listener is None:
            await self._forget(key)
            return None
        os.close(listener)
        known = self._pagers.get(key)
        if known is not None:
            return known
        pager = GrpcPager(directory, _vm_of(directory), self._settings)
        try:
            status = await pager.raw_status(FIND_S)
        except VmferryError:
            await pager.close()
            raise
        log.info(FOUND, key=key, vm=status.vm, pid=status.pid)
        self._pagers[key] = pager
        self._health[key] = ProcessHealth(status.pid)
        return pager

    def health(self, key: str) -> PagerHealth | None:
        known = self._health.get(key)
        return known.look() if known is not None else None

    async def remove(self, key: str) -> None:
        directory = self._directory(key)
        self._health.pop(key, None)
        if not directory.exists():
            return
        listener = await asyncio.to_thread(_listener, directory / CONTROL_SOCKET)
        if listener is not None:
            try:
                await self._end(key, directory, listener)
            finally:
                os.close(listener)
        await self._forget(key)
        await asyncio.to_thread(_clear, directory)
        log.info(REMOVED, key=key)

    def keys(self) -> list[str]:
        """The keys of all runtime directories, with or without a running pager."""
        return sorted(path.name for path in self._root.iterdir()) if self._root.is_dir() else []

    async def close(self) -> None:
        """Closes the connections. The pagers keep running."""
        for key in list(self._pagers):
            await self._forget(key)
        for process in self._watched:
            asyncio.get_running_loop().remove_reader(process)
            os.close(process)
        self._watched.clear()

    def _reap_when_it_ends(self, key: str, child: subprocess.Popen[bytes]) -> None:
        """Reaps a pager of this daemon when it ends, so that no zombie stays."""
        process = os.pidfd_open(child.pid)
        loop = asyncio.get_running_loop()

        def reap() -> None:
            loop.remove_reader(process)
            self._watched.discard(process)
            os.close(process)
            log.info(ENDED, key=key, pid=child.pid, status=child.wait())
            if self._children.get(key) is child:
                del self._children[key]

        self._watched.add(process)
        loop.add_reader(process, reap)

    async def _end(self, key: str, directory: Path, listener: int) -> None:
        pager = self._pagers.get(key) or GrpcPager(directory, _vm_of(directory), self._settings)
        self._pagers[key] = pager
        with suppress(VmferryError):
            await pager.shutdown(even_if_guest_dies=True)
        if await self._ended(listener):
            return
        signal.pidfd_send_signal(listener, signal.SIGKILL)
        log.warning(KILLED, key=key)
        if not await self._ended(listener):
            raise VmferryError(
                Reason.PAGER_FAILED,
                f"The pager of {directory.name} does not end, {STOP_S:g} s after SIGKILL.",
                "It waits in the kernel: see /proc/PID/stack of its threads.",
            )

    async def _ended(self, process: int) -> bool:
        """Whether the process of a pidfd ends within STOP_S. The pidfd is readable once the process has ended."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(process, ended.set)
        try:
            async with asyncio.timeout(STOP_S):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(process)
        return True

    async def _until_it_answers(self, child: subprocess.Popen[bytes], pager: GrpcPager, directory: Path) -> None:
        try:
            async with asyncio.timeout(START_S):
                while True:
                    if child.poll() is not None:
                        raise _failed(f"ended with status {child.returncode} at its start", directory)
                    if (directory / CONTROL_SOCKET).exists():
                        with suppress(VmferryError):
                            await pager.raw_status(1.0)
                            return
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise _failed(f"did not answer within {START_S:g} s of its start", directory) from error

    async def _forget(self, key: str) -> None:
        pager = self._pagers.pop(key, None)
        if pager is not None:
            await pager.close()

    def _directory(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise VmferryError(Reason.INVALID_ARGUMENT, f"The key {key!r} is not {KEY.pattern}.")
        return directory_of(self._runtime_dir, key)


def locate(program: str, key: str = "[pager] program") -> str:
    """The path of the pager's program: a path as it is; a name next to this Python, where the wheel puts it, or on
    PATH.

    Raises: VmferryError PAGER_FAILED.
    """
    beside = Path(sys.executable).parent / program
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(program)
    if found is None:
        raise VmferryError(
            Reason.PAGER_FAILED,
            f"The program {program} is neither next to {sys.executable} nor on PATH.",
            f"Install the vmferry wheel, or set {key} to its path.",
        )
    return found


async def _spawned(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Starts the process. A caller that is cancelled leaves no pager behind: the thread would start it all the same."""
    spawning = asyncio.create_task(asyncio.to_thread(_spawn, command, log_path))
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        with suppress(VmferryError):
            await _kill(await spawning)
        raise


async def _kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    await asyncio.to_thread(child.wait)


def _spawn(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Starts the process in a session of its own: it gets no signal for the daemon's process group."""
    with log_path.open("ab") as log_file:
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
            )
        except OSError as error:
            raise VmferryError(
                Reason.PAGER_FAILED, f"{command[0]} cannot be started ({error}).", "Check [pager] program."
            ) from error


def _listener(path: Path) -> int | None:
    """A pidfd of the process that listens on the socket. None: no process does. The kernel names it (SO_PEERCRED)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(FIND_S)
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        with suppress(ProcessLookupError):
            return os.pidfd_open(pid)
    return None


def _clear(directory: Path) -> None:
    """Removes the directory. Its pager may remove files of its own at the same time, which ends one attempt."""
    while directory.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(directory)


def _vm_of(directory: Path) -> str:
    with suppress(OSError):
        return (directory / "vm").read_text()
    return directory.name


def _failed(what: str, directory: Path) -> VmferryError:
    log_path = directory / "pager.log"
    tail = log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace") if log_path.exists() else ""
    lines = "\n".join(tail.splitlines()[-LOG_LINES:])
    return VmferryError(Reason.PAGER_FAILED, f"The pager {what}; its last words: {lines or 'none'}", f"See {log_path}.")
