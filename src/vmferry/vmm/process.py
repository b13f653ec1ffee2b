"""The process of a VMM, by its number in the daemon's pid namespace. A VMM in a container knows other numbers
(pid_namespaces(7))."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

_CREDENTIALS = struct.Struct("iII")
_NSPID = re.compile(r"^NSpid:\s.*?(\d+)$", re.MULTILINE)
PROC = Path("/proc")


def peer_of(connection: socket.socket) -> int:
    """The process that connected, or that made the listening socket (unix(7), SO_PEERCRED). 0: it cannot be seen."""
    pid: int = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def is_known_as(directory: Path, number: int) -> bool:
    """Whether a process or thread, by its directory in /proc, has this number in its own namespace (NSpid of
    proc_pid_status(5))."""
    try:
        found = _NSPID.search((directory / "status").read_text(errors="surrogateescape"))
    except OSError:
        return False
    return found is not None and int(found[1]) == number


def process_named(peer: int, pid: int) -> int:
    """The process that calls itself `pid` on a connection of `peer`."""
    return peer if peer and is_known_as(PROC / str(peer), pid) else pid


def process_of_thread(thread: int, peer: int, address: str) -> int | None:
    """The process with this thread, which serves the unix socket bound to `address`. `peer`: the process that made the
    socket, which may have passed it on."""
    if peer and _has_thread(peer, thread):
        return peer
    own = _link(PROC / "self/ns/pid")
    for directory in PROC.iterdir():
        if not directory.name.isdigit():
            continue
        pid = int(directory.name)
        # In the daemon's namespace the number itself names the thread; only elsewhere each process is looked through.
        near = (directory / "task" / str(thread)).exists()
        if (
            (near or _link(directory / "ns/pid") not in {own, ""})
            and _has_thread(pid, thread)
            and _serves(pid, address)
        ):
            return pid
    return None


def _has_thread(pid: int, thread: int) -> bool:
    tasks = PROC / str(pid) / "task"
    try:
        return any(is_known_as(task, thread) for task in tasks.iterdir())
    except OSError:
        return False


def _serves(pid: int, address: str) -> bool:
    """Whether the process holds a socket that is bound to the address (proc_pid_net(5), unix)."""
    directory = PROC / str(pid)
    try:
        lines = (directory / "net/unix").read_text(errors="surrogateescape").splitlines()
        bound = {f"socket:[{line.split()[6]}]" for line in lines[1:] if line.endswith(f" {address}")}
        return any(_link(one) in bound for one in (directory / "fd").iterdir())
    except OSError:
        return False


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
