"""The limits on memory that this host sets to a process: `ports.MemoryRooms`.

| limit | source |
|---|---|
| memory of the host | /proc/meminfo (proc(5)) |
| huge pages of the host | /sys/kernel/mm/hugepages (Documentation/admin-guide/mm/hugetlbpage.rst) |
| memory and huge pages of a cgroup | cgroups(7), versions 1 and 2, and both at once |

A limit that cannot be read counts as none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.model.memory import MemoryRoom
from vmferry.units import GIB, MIB, PAGE_4K

CGROUPS = Path("/sys/fs/cgroup")
UNIFIED = "unified"
"""The directory of version 2 on a host that has both."""
PROC = Path("/proc")
POOLS = Path("/sys/kernel/mm/hugepages")


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one controller. The page cache of files can be given up, so it does not count as used."""

    limit: str
    used: str
    cache: tuple[str, ...] = ()


_MEMORY_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_MEMORY_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True, slots=True)
class HostRooms:
    """The limits of this host."""

    cgroups: Path = CGROUPS
    proc: Path = PROC
    pools: Path = POOLS

    def of_host(self, page_size: int) -> Sequence[MemoryRoom]:
        """The limit on all processes together."""
        room = self._available() if page_size == PAGE_4K else self._pool(page_size)
        return () if room is None else (room,)

    def of_process(self, pid: int, page_size: int) -> Sequence[MemoryRoom]:
        """The limits of the process's cgroup and of each above it."""
        if page_size == PAGE_4K:
            return self._cgroups(pid, "memory", _MEMORY_V1, _MEMORY_V2)
        size = f"hugetlb.{_size_name(page_size)}"
        first = _Files(f"{size}.limit_in_bytes", f"{size}.usage_in_bytes")
        return self._cgroups(pid, "hugetlb", first, _Files(f"{size}.max", f"{size}.current"))

    def _available(self) -> MemoryRoom | None:
        try:
            lines = (self.proc / "meminfo").read_text().splitlines()
            kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
            total, left = kib["MemTotal"] + kib["SwapTotal"], kib["MemAvailable"] + kib["SwapFree"]
        except (OSError, ValueError, KeyError, IndexError):
            return None
        return MemoryRoom("this host", total << 10, left << 10)

    def _pool(self, page_size: int) -> MemoryRoom | None:
        """Reserved pages belong to other mappings. Surplus pages are made on demand, up to a limit."""
        pool = self.pools / f"hugepages-{page_size >> 10}kB"
        try:
            total, free, reserved, surplus, most = (
                int((pool / f"{name}_hugepages").read_text())
                for name in ("nr", "free", "resv", "surplus", "nr_overcommit")
            )
        except (OSError, ValueError):
            return None
        more = max(0, most - surplus)
        where, left = f"this host's pool of {_size_name(page_size)} pages", max(0, free - reserved + more)
        remedy = f"Set more huge pages aside there ({pool}/nr_hugepages), or take another destination."
        return MemoryRoom(where, (total + more) * page_size, left * page_size, remedy)

    def _cgroups(self, pid: int, controller: str, first: _Files, second: _Files) -> Sequence[MemoryRoom]:
        found = []
        for path, files in self._paths(pid, controller, first, second):
            room = _cgroup_room(path, files)
            if room is not None:
                found.append(room)
        return found

    def _paths(self, pid: int, controller: str, first: _Files, second: _Files) -> Iterator[tuple[Path, _Files]]:
        try:
            lines = (self.proc / str(pid) / "cgroup").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return
        for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
            if controller in controllers.split(","):
                yield from ((level, first) for level in _levels(self.cgroups / controller, path))
            elif not controllers:
                hybrid = self.cgroups / UNIFIED
                top = hybrid if hybrid.is_dir() else self.cgroups
                yield from ((level, second) for level in _levels(top, path))


def _levels(top: Path, path: str) -> list[Path]:
    own = top / path.lstrip("/")
    levels = [own, *own.parents]
    return levels[: levels.index(top) + 1]


def _cgroup_room(cgroup: Path, files: _Files) -> MemoryRoom | None:
    try:
        limit, used = (cgroup / files.limit).read_text().strip(), int((cgroup / files.used).read_text())
        stat: dict[str, str] = {}
        if files.cache:
            stat = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    given_up = sum(int(stat.get(name, "0")) for name in files.cache)
    return MemoryRoom(f"the cgroup {cgroup}", int(limit), max(0, int(limit) - max(0, used - given_up)))


def _size_name(page_size: int) -> str:
    """As the kernel names it (mem_fmt, mm/hugetlb_cgroup.c)."""
    return f"{page_size // GIB}GB" if page_size >= GIB else f"{page_size // MIB}MB"
