"""CPU lists as in cpuset(7), e.g. "2-3,7": read and checked. Pure."""

from __future__ import annotations

import re

CPU_MOST = 8191
"""Linux is built for at most 8192 CPUs (NR_CPUS, arch/x86/Kconfig)."""

_RUN = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


class CpuListError(ValueError):
    """The text is not a CPU list. The message names the part and its fault."""


def parse_cpu_list(text: str) -> frozenset[int]:
    """The CPUs of a list; "" has none.

    Raises: CpuListError.
    """
    cpus: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RUN.fullmatch(part)
        if match is None:
            raise CpuListError(f"{part!r} is neither a CPU nor a range of CPUs")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise CpuListError(f"{part!r} runs backwards")
        if last > CPU_MOST:
            raise CpuListError(f"{part!r} goes beyond CPU {CPU_MOST}")
        twice = cpus & set(range(first, last + 1))
        if twice:
            raise CpuListError(f"CPU {min(twice)} comes twice")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)
