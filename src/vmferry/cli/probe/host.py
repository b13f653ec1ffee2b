"""Limits, permissions, memory and programs of this host."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

from vmferry.cli.probe import libc
from vmferry.cli.probe.attempt import attempt
from vmferry.cli.probe.finding import Finding, missing, ok, warn
from vmferry.client.plain import size_words
from vmferry.demo.programs import ProgramMissingError, find_program
from vmferry.units import GIB, MIB

DESCRIPTORS_WANTED = 4096
"""Enough for a daemon with a hundred moving VMs: sockets, lanes, event streams."""
MEMLOCK_WANTED = 8 * MIB
DEMO_MEMORY = 3 * GIB // 2
"""Room for both copies of a 512 MiB guest and for the programs that move them."""
HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_SHARED = ctypes.create_string_buffer(b"vmferry!")
"""A forked child has it at the same address."""


def check_descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"RLIMIT_NOFILE {soft}, at most {hard}"
    if soft >= DESCRIPTORS_WANTED:
        return ok("open files", seen)
    return warn("open files", seen, f"LimitNOFILE={DESCRIPTORS_WANTED} in the unit, or ulimit -n.")


def check_locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "RLIMIT_MEMLOCK unlimited")
    seen = f"RLIMIT_MEMLOCK {size_words(soft)}"
    if soft >= MEMLOCK_WANTED:
        return ok("locked memory", seen)
    return warn(
        "locked memory", seen, "VMMs that lock guest memory need more: LimitMEMLOCK= in the unit, or ulimit -l."
    )


def try_read_process() -> str:
    """Reads the parent's memory. As with a pager and its VMM, the two processes share only the user."""
    seen = libc.read_process(os.getppid(), ctypes.addressof(_SHARED), 8)
    return f"another process's memory can be read ({len(seen)} bytes)"


def check_process_memory() -> Finding:
    found = attempt(try_read_process)
    scope = YAMA.read_text().strip() if YAMA.exists() else "absent"
    seen = f"{found.seen}, yama ptrace_scope {scope}"
    if found.worked:
        return ok("process memory", seen)
    return warn(
        "process memory", seen, "A source with anonymous memory needs CAP_SYS_PTRACE for its pager; memfds do not."
    )


def try_network_namespace() -> str:
    libc.unshare_network()
    return "a network namespace can be made"


def check_network_namespace() -> Finding:
    found = attempt(try_network_namespace)
    if found.worked:
        return ok("network namespaces", found.seen)
    return warn("network namespaces", found.seen, "The demo uses loopback then; as root it gives each host a network.")


def check_memory() -> Finding:
    available = meminfo("MemAvailable")
    seen = f"{size_words(available)} available"
    if available >= DEMO_MEMORY:
        return ok("memory", seen)
    return warn("memory", seen, f"The demo wants {size_words(DEMO_MEMORY)}: give it less with --memory.")


def meminfo(name: str) -> int:
    """A field of /proc/meminfo in bytes; 0 if there is none."""
    for line in Path("/proc/meminfo").read_text(errors="surrogateescape").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def try_huge_page(size: int) -> str:
    """Maps a huge page. The kernel reserves it at once; nothing touches it."""
    libc.mmap(size, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_HUGETLB | (size.bit_length() - 1) << 26)
    return "can be mapped"


def check_huge_pages() -> Finding:
    seen = []
    usable = False
    for directory in sorted(HUGE_PAGES.glob("hugepages-*kB")) if HUGE_PAGES.exists() else ():
        size = int(directory.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        free = int((directory / "free_hugepages").read_text())
        words = f"{free} free of {size_words(size)}"
        if free:
            tried = attempt(lambda size=size: try_huge_page(size))  # type: ignore[misc]
            usable = usable or tried.worked
            words += f" ({tried.seen})"
        seen.append(words)
    words = ", ".join(seen) or "none known to the kernel"
    if usable:
        return ok("huge pages", words)
    return warn("huge pages", words, "Only guests on huge pages need them: sysctl vm.nr_hugepages=N.")


def check_kernel() -> Finding:
    """Shows the version. The other checks try the abilities that it should have."""
    system = os.uname()
    if system.sysname == "Linux" and system.machine == "x86_64":
        return ok("kernel", f"{system.sysname} {system.release} {system.machine}")
    return missing("kernel", f"{system.sysname} {system.release} {system.machine}", "vmferry runs on x86-64 Linux.")


def check_program(name: str, needed: bool, todo: str) -> Finding:
    try:
        return ok(name, str(find_program(name)))
    except ProgramMissingError as error:
        return (missing if needed else warn)(name, error.message, todo)
