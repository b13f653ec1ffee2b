"""Checks, while the VM still runs on its source, that this host has room for its memory.

A page is charged to the process that touches it first, or whose system call makes it:

| memory | charged to |
|---|---|
| memfd, and huge pages of either kind | the pager, a child of the daemon in its cgroup |
| anonymous memory of 4 KiB pages | the VMM |
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion, MemoryRoom, PageRange
from vmferry.ports import MemoryRooms
from vmferry.units import MIB, PAGE_4K

PAGERS = "the daemon and its pagers"
VMM = "the VMM"


def check_room(vm: str, layout: MemoryLayout, held: Sequence[PageRange], vmm_pid: int, rooms: MemoryRooms) -> None:
    """Raises: VmferryError DESTINATION_NO_MEMORY, naming the limit and the numbers."""
    charged = _charged(layout, held)
    for (payer, page_size), needed in charged.items():
        pid = vmm_pid if payer == VMM else os.getpid()
        for room in rooms.of_process(pid, page_size):
            _check(vm, needed, page_size, f" charged to {payer}", room)
    for page_size in {size for _, size in charged}:
        needed = sum(one for (_, size), one in charged.items() if size == page_size)
        for room in rooms.of_host(page_size):
            _check(vm, needed, page_size, "", room)


def _check(vm: str, needed: int, page_size: int, charged: str, room: MemoryRoom) -> None:
    if room.bytes >= needed:
        return
    huge = f" in pages of {page_size // MIB} MiB" if page_size > PAGE_4K else ""
    raise VmferryError(
        Reason.DESTINATION_NO_MEMORY,
        f"{vm} needs {needed / MIB:.0f} MiB{huge}{charged}, and {room.where} has {room.bytes / MIB:.0f} MiB left of "
        f"{room.limit / MIB:.0f} MiB.",
        room.remedy,
    )


def _charged(layout: MemoryLayout, held: Sequence[PageRange]) -> Counter[tuple[str, int]]:
    """The bytes that the held pages take here, by payer and page size. `held` ascends."""
    bytes_of: Counter[tuple[str, int]] = Counter()
    last = (-1, -1)
    for one in held:
        region = layout.regions[one.region]
        pages = region.page_size // PAGE_4K
        first, end = one.page // pages, -(-(one.page + one.count) // pages)
        if (one.region, first) == last:  # The range before ends in the same huge page.
            first += 1
        bytes_of[_payer(region), region.page_size] += max(0, end - first) * region.page_size
        last = (one.region, end - 1)
    return bytes_of


def _payer(region: MemoryRegion) -> str:
    return VMM if region.backing is Backing.ANONYMOUS and region.page_size == PAGE_4K else PAGERS
