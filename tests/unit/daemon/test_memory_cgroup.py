"""The memory cgroup of a process, in files as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path

from vmferry.daemon.memory_cgroup import memory_room
from vmferry.model.memory import MemoryRoom


def process(proc: Path, lines: str) -> Path:
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text(lines)
    return proc


def group(path: Path, files: dict[str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(f"{text}\n")


def v2(path: Path, limit: str, usage: int, cache: int = 0) -> None:
    stat = f"anon 5\nfile 900\ninactive_file {cache}\nactive_file 0"
    group(path, {"memory.max": limit, "memory.current": str(usage), "memory.stat": stat})


def test_version_2_counts_the_narrowest_level_without_the_page_cache(tmp_path: Path) -> None:
    proc = process(tmp_path / "proc", "0::/machine/web\n")
    v2(tmp_path / "machine", "1000", 600, cache=100)
    v2(tmp_path / "machine" / "web", "max", 400)
    assert memory_room(7, tmp_path, proc) == MemoryRoom(str(tmp_path / "machine"), 1000, 500)
    v2(tmp_path / "machine" / "web", "450", 400)
    assert memory_room(7, tmp_path, proc) == MemoryRoom(str(tmp_path / "machine" / "web"), 450, 50)


def test_version_1_has_a_hierarchy_of_its_own(tmp_path: Path) -> None:
    proc = process(tmp_path / "proc", "4:cpu,cpuacct:/x\n3:memory:/vms\n0::/other\n")
    stat = "total_inactive_file 30\ntotal_active_file 20"
    path = tmp_path / "memory" / "vms"
    group(path, {"memory.limit_in_bytes": "300", "memory.usage_in_bytes": "250", "memory.stat": stat})
    assert memory_room(7, tmp_path, proc) == MemoryRoom(str(path), 300, 100)


def test_nothing_that_can_be_read_is_no_limit(tmp_path: Path) -> None:
    assert memory_room(7, tmp_path, tmp_path) is None
    assert memory_room(7, tmp_path, process(tmp_path / "proc", "0::/../..\n")) is None


def test_the_kernels_own_files_are_understood() -> None:
    room = memory_room(os.getpid())
    assert room is None or 0 <= room.bytes <= room.limit
