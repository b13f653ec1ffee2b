"""The limits on memory, in files as the kernel writes them, and in the kernel's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cgroups, huge_pages
from vmferry.daemon.memory_room import UNIFIED, HostRooms
from vmferry.model.memory import MemoryRoom
from vmferry.units import MIB, PAGE_1G, PAGE_2M, PAGE_4K


def process(proc: Path, lines: str) -> None:
    (proc / "7").mkdir(parents=True)
    (proc / "7" / "cgroup").write_text(lines)


def group(path: Path, files: dict[str, str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).write_text(f"{text}\n")


def v2(path: Path, limit: str, usage: int, cache: int = 0) -> None:
    stat = f"anon 5\nfile 900\ninactive_file {cache}\nactive_file 0"
    group(path, {"memory.max": limit, "memory.current": str(usage), "memory.stat": stat})


@pytest.fixture
def rooms(tmp_path: Path) -> HostRooms:
    return HostRooms(tmp_path / "cgroup", tmp_path / "proc", tmp_path / "pools")


def test_version_2_counts_every_level_without_the_page_cache(rooms: HostRooms) -> None:
    process(rooms.proc, "0::/machine/web\n")
    machine, web = rooms.cgroups / "machine", rooms.cgroups / "machine" / "web"
    v2(machine, "1000", 600, cache=100)
    v2(web, "max", 400)
    outer = MemoryRoom(f"the cgroup {machine}", 1000, 500)
    assert rooms.of_process(7, PAGE_4K) == [outer]
    v2(web, "450", 400)
    assert rooms.of_process(7, PAGE_4K) == [MemoryRoom(f"the cgroup {web}", 450, 50), outer]


def test_version_1_has_a_hierarchy_of_its_own(rooms: HostRooms) -> None:
    process(rooms.proc, "4:cpu,cpuacct:/x\n3:memory:/vms\n0::/other\n")
    stat = "total_inactive_file 30\ntotal_active_file 20"
    path = rooms.cgroups / "memory" / "vms"
    group(path, {"memory.limit_in_bytes": "300", "memory.usage_in_bytes": "250", "memory.stat": stat})
    assert rooms.of_process(7, PAGE_4K) == [MemoryRoom(f"the cgroup {path}", 300, 100)]


@pytest.mark.parametrize(("size", "name"), [(PAGE_2M, "2MB"), (PAGE_1G, "1GB")])
def test_huge_pages_of_a_cgroup(rooms: HostRooms, size: int, name: str) -> None:
    """A host with both versions has version 2 in a directory of its own."""
    process(rooms.proc, "9:hugetlb:/old\n3:memory:/vms\n0::/new\n")
    old, new = rooms.cgroups / "hugetlb" / "old", rooms.cgroups / UNIFIED / "new"
    group(old, {f"hugetlb.{name}.limit_in_bytes": "80", f"hugetlb.{name}.usage_in_bytes": "60"})
    group(new, {f"hugetlb.{name}.max": "40", f"hugetlb.{name}.current": "10"})
    assert rooms.of_process(7, size) == [
        MemoryRoom(f"the cgroup {old}", 80, 20),
        MemoryRoom(f"the cgroup {new}", 40, 30),
    ]


def test_the_pool_of_huge_pages_counts_neither_reserved_pages_nor_those_beyond_its_limit(rooms: HostRooms) -> None:
    pool = rooms.pools / "hugepages-2048kB"
    counts = {"nr": 10, "free": 6, "resv": 2, "surplus": 1, "nr_overcommit": 3}
    group(pool, {f"{key}_hugepages": str(count) for key, count in counts.items()})
    room = rooms.of_host(PAGE_2M)[0]
    assert (room.where, room.limit, room.bytes) == ("this host's pool of 2MB pages", 12 * PAGE_2M, 6 * PAGE_2M)
    assert f"{pool}/nr_hugepages" in room.remedy
    assert rooms.of_host(PAGE_1G) == ()


def test_the_hosts_memory_counts_swap(rooms: HostRooms) -> None:
    rooms.proc.mkdir()
    (rooms.proc / "meminfo").write_text(
        "MemTotal: 80 kB\nMemAvailable: 30 kB\nSwapTotal: 20 kB\nSwapFree: 5 kB\nHugePages_Total: 7\n"
    )
    assert rooms.of_host(PAGE_4K) == (MemoryRoom("this host", 100 << 10, 35 << 10),)


def test_nothing_that_can_be_read_is_no_limit(rooms: HostRooms) -> None:
    assert rooms.of_process(7, PAGE_4K) == []
    assert rooms.of_host(PAGE_4K) == rooms.of_host(PAGE_2M) == ()
    process(rooms.proc, "0::/../..\nnonsense\n")
    assert rooms.of_process(7, PAGE_4K) == []


def test_the_kernels_own_files_are_understood() -> None:
    for size in (PAGE_4K, PAGE_2M):
        for room in (*HostRooms().of_process(os.getpid(), size), *HostRooms().of_host(size)):
            assert 0 <= room.bytes <= room.limit
    assert HostRooms().of_host(PAGE_4K)[0].limit > 16 * MIB


def test_a_real_cgroup_of_memory() -> None:
    with (
        cgroups.limited("memory", ("memory.max", "memory.limit_in_bytes"), 64 * MIB) as group,
        subprocess.Popen(
            cgroups.inside(group, ["sh", "-c", "echo here; read end"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        room = HostRooms().of_process(child.pid, PAGE_4K)[0]
        child.communicate()
    assert (room.where, room.limit) == (f"the cgroup {group}", 64 * MIB)
    assert 32 * MIB < room.bytes <= 64 * MIB


HOLDER = """
import mmap, sys
memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
memory[0] = memory[2 << 20] = 1
print("here", flush=True)
sys.stdin.read()
"""


def test_a_real_cgroup_of_huge_pages() -> None:
    """A process that has two huge pages leaves the room of three below a limit of five."""
    with (
        huge_pages.reserved(2),
        cgroups.limited("hugetlb", ("hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"), 5 * PAGE_2M) as group,
        subprocess.Popen(
            cgroups.inside(group, [sys.executable, "-c", HOLDER]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"here\n"
        rooms, pool = HostRooms().of_process(holder.pid, PAGE_2M), HostRooms().of_host(PAGE_2M)[0]
        holder.communicate()
    assert rooms[0] == MemoryRoom(f"the cgroup {group}", 5 * PAGE_2M, 3 * PAGE_2M)
    assert pool.limit >= 2 * PAGE_2M
