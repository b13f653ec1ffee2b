"""The memory that a process's cgroup, or one above it, still lets it take (cgroups(7), versions 1 and 2)."""

from __future__ import annotations

from pathlib import Path

from vmferry.model.memory import MemoryRoom

ROOT = Path("/sys/fs/cgroup")


def memory_room(pid: int, root: Path = ROOT, proc: Path = Path("/proc")) -> MemoryRoom | None:
    """The narrowest cgroup of the process. None: no limit, or none that can be read."""
    top, own, names = _own_cgroup(pid, root, proc)
    if own is None:
        return None
    levels = [own, *own.parents]
    limited = [_room(level, names) for level in levels[: levels.index(top) + 1]]
    return min((room for room in limited if room is not None), key=lambda room: room.bytes, default=None)


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
_V2 = ("memory.max", "memory.current", "inactive_file", "active_file")


def _own_cgroup(pid: int, root: Path, proc: Path) -> tuple[Path, Path | None, tuple[str, str, str, str]]:
    try:
        lines = (proc / str(pid) / "cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return root, None, _V2
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if ":" in line)}
    for controllers, path in paths.items():
        if "memory" in controllers.split(","):
            return root / "memory", root / "memory" / path.lstrip("/"), _V1
    unified = paths.get("")
    return root, None if unified is None else root / unified.lstrip("/"), _V2


def _room(cgroup: Path, names: tuple[str, str, str, str]) -> MemoryRoom | None:
    """The page cache of files can be given up, so it does not count."""
    limit_name, usage_name, *cache = names
    try:
        limit, usage = (cgroup / limit_name).read_text().strip(), int((cgroup / usage_name).read_text())
        stat = dict(line.split(" ", 1) for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdecimal():
        return None
    given_up = sum(int(stat.get(name, "0")) for name in cache)
    return MemoryRoom(str(cgroup), int(limit), max(0, int(limit) - max(0, usage - given_up)))
