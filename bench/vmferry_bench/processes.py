"""CPU time of the processes of a round, of vCPU threads and of all others, and memory that is warm."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
LOOK_EVERY_S = 0.02
"""How often processes that end during a round are read. CPU time after the last reading is lost."""
_VCPU = re.compile(r"vcpu\d+|CPU \d+/KVM")
MADV_POPULATE_WRITE = 23


def process_cpu_s(pid: int) -> float:
    """User and system time of a process, its ended threads included; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / TICKS


def machine_cpu() -> tuple[int, int]:
    """Ticks since boot that all cores together were busy, and all ticks (proc_stat(5))."""
    fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def busy_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    """Of all cores, between two readings."""
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


def vcpu_threads(pid: int) -> list[Path]:
    """The /proc directories of its vCPU threads, by their names."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:
            continue  # the thread has ended
        if _VCPU.fullmatch(name):
            found.append(task)
    return found


def thread_cpu_s(task: Path) -> float:
    """Time on a processor; 0 if it is gone."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def program_name(pid: int) -> str:
    """As the kernel knows it (at most 15 bytes); "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class CpuWatch:
    """Counts from `start` to `stop`. `vmms`: processes with vCPU threads; they and `others` may end before."""

    def __init__(self, vmms: list[int], others: list[int]) -> None:
        self._pids = [*vmms, *others]
        self._vmms = vmms
        self._names = {pid: program_name(pid) for pid in self._pids}
        self._tasks: set[Path] = set()
        self._first: dict[int | Path, float] = {}
        self._last: dict[int | Path, float] = {}
        self._looking: asyncio.Task[None] | None = None

    def _look(self) -> None:
        for pid in self._pids:
            self._last[pid] = max(self._last.get(pid, 0.0), process_cpu_s(pid))
        for task in self._tasks:
            self._last[task] = max(self._last.get(task, 0.0), thread_cpu_s(task))

    def start(self) -> None:
        self._tasks.update(task for pid in self._vmms for task in vcpu_threads(pid))
        self._look()
        self._first = dict(self._last)
        self._looking = asyncio.create_task(self._keep_looking(), name="cpu watch")

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._look()

    def add(self, pids: list[int]) -> None:
        """Processes that were started since; all of their time counts."""
        new = [pid for pid in pids if pid not in self._pids]
        self._names |= {pid: program_name(pid) for pid in new}
        self._pids += new

    def stop(self) -> tuple[float, float, dict[str, float]]:
        """Seconds of all but vCPU threads, of those, and of all threads by program."""
        if self._looking is not None:
            self._looking.cancel()
        for pid in self._vmms:  # vCPU threads that were made for the guest that came
            if Path(f"/proc/{pid}").exists():
                self._tasks.update(vcpu_threads(pid))
        self._look()
        used = {key: last - self._first.get(key, 0.0) for key, last in self._last.items()}
        vcpu = sum(s for key, s in used.items() if isinstance(key, Path))
        whole = sum(s for key, s in used.items() if isinstance(key, int))
        programs: dict[str, float] = {}
        for pid, name in self._names.items():
            programs[name] = programs.get(name, 0.0) + used.get(pid, 0.0)
        return max(whole - vcpu, 0.0), vcpu, {name: round(s, 3) for name, s in programs.items()}


_WARM = f"""
import mmap, sys
huge, small = (mmap.mmap(-1, int(size), mmap.MAP_PRIVATE) for size in sys.argv[1:])
huge.madvise(mmap.MADV_HUGEPAGE)
for memory in (huge, small):
    memory.madvise({MADV_POPULATE_WRITE})
"""


async def warm_memory(guest: int) -> None:
    """Has the host give this machine enough memory for another guest of so many bytes. Memory that has been free for
    two seconds goes back to the host, and costs far more to touch again. A child process touches it and frees it.

    It touches as much as the guest has in huge pages, which either side may use, and twice as much in small ones. The
    kernel hands out small free pieces first, so the destination would otherwise get other memory in part.
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _WARM, str(guest), str(2 * guest))
    await process.wait()
