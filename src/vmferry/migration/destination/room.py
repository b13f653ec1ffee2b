"""Checks, while the VM still runs on its source, that the memory cgroups here have room for it.

A page is charged to the process that touches it first. In a memfd that is the pager, a child of the daemon in its
cgroup; in anonymous memory it is the VMM. Huge pages of hugetlbfs are not charged to a memory cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing, MemoryLayout, MemoryRoom, PageRange
from vmferry.units import MIB, PAGE_4K


def check_room(
    vm: str,
    layout: MemoryLayout,
    held: Sequence[PageRange],
    vmm_pid: int,
    room_of: Callable[[int], MemoryRoom | None],
) -> None:
    """Raises: VmferryError DESTINATION_NO_MEMORY, naming the cgroup and the numbers."""
    for who, pid, memfd in (("the daemon and its pagers", os.getpid(), True), ("the VMM", vmm_pid, False)):
        needed = _charged(layout, held, memfd)
        room = room_of(pid) if needed else None
        if room is not None and room.bytes < needed:
            raise VmferryError(
                Reason.DESTINATION_NO_MEMORY,
                f"the memory of {vm}, {needed / MIB:.0f} MiB, is charged to {who}, and the cgroup {room.cgroup} has "
                f"{room.bytes / MIB:.0f} MiB left of {room.limit / MIB:.0f} MiB.",
                "Raise the cgroup's limit, or take another destination.",
            )


def _charged(layout: MemoryLayout, held: Sequence[PageRange], memfd: bool) -> int:
    regions = layout.regions
    return sum(
        one.count * PAGE_4K
        for one in held
        if regions[one.region].page_size == PAGE_4K and (regions[one.region].backing is Backing.MEMFD) is memfd
    )
