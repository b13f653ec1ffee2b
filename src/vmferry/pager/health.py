"""A pager's process by /proc: whether it lives, how it ended, its time and its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

from vmferry.model.pager import PagerHealth

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProcessHealth:
    """One process. `child` is known for a process that this daemon started: the kernel then tells how it ended."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self._child = child
        self._started = _stat(pid)[19:20]
        self._last = PagerHealth(pid, alive=True)

    def look(self) -> PagerHealth:
        """The process now. A dead one keeps its last figures."""
        if not self._last.alive:
            return self._last
        fields = _stat(self._last.pid)
        status = self._child.poll() if self._child is not None else None
        # Another process may have the pid: it began at another time (proc_pid_stat(5), field 22).
        if status is not None or not fields or fields[0] in ("Z", "X") or fields[19:20] != self._started:
            self._last = replace(self._last, alive=False, exit=exit_words(status), ended_us=time.time_ns() // 1000)
            return self._last
        cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        self._last = replace(self._last, cpu_s=cpu_s, memory_bytes=_own_memory(self._last.pid))
        return self._last


def exit_words(status: int | None) -> str:
    """How a process ended, from its return code: negative is a signal. None: not known."""
    if status is None:
        return "has ended"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from the third, the state, on; empty if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _own_memory(pid: int) -> int:
    """Resident memory that is not shared (proc_pid_statm(5)): the guest's own memory is mapped shared."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(errors="surrogateescape").split()
    except OSError:
        return 0
    return max(0, int(fields[1]) - int(fields[2])) * _PAGE
