"""The conditions on the host before the daemon starts: writable directories, and a lock on the state."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

LOCK_NAME = "lock"


class HostUnfit(Exception):  # noqa: N818 - names the state of the host
    """The daemon cannot run on this host with this configuration. The message has cause and remedy in one line."""


def make_directory(path: Path, key: str, mode: int) -> None:
    """Makes the directory if it is missing, and tries to write in it.

    Raises:
        HostUnfit: it cannot be made or written.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise HostUnfit(
            f"{key} {path} cannot be written: {error.strerror}. Make it a directory of the daemon's user, "
            f"or set {key} to another."
        ) from error


class InstanceLock:
    """A lock for the daemon's life. The kernel drops it with the process, so a crash leaves nothing behind."""

    def __init__(self, state_dir: Path) -> None:
        """Raises: HostUnfit, if another daemon has it."""
        path = state_dir / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostUnfit(
                f"{path} cannot be opened: {error.strerror}. Make it a file of the daemon's user, or remove it."
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise HostUnfit(
                f"Another vmferryd (process {holder}) uses state_dir {state_dir}. Stop it, or give this daemon "
                "a state_dir and a runtime_dir of its own."
            ) from error
        os.truncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)
