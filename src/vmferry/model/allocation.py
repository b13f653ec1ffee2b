"""The memory that a source really holds, as ranges of 4 KiB pages: its size and the time to allocate it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.units import MIB, PAGE_4K

HELD_MAX = 65_536
"""The most ranges that a pager lists (pager.proto)."""

LEAST_BYTES_PER_S = 256 * MIB
"""Deadlines grow by the time that memory takes at this rate. A host that is slower counts as stuck."""


def held_bytes(held: Iterable[PageRange]) -> int:
    return sum(one.count for one in held) * PAGE_4K


def layout_bytes(layout: MemoryLayout) -> int:
    return sum(region.size for region in layout.regions)


def allocation_s(size: int) -> float:
    """Seconds that a deadline adds for `size` bytes of memory."""
    return size / LEAST_BYTES_PER_S


def held_problem(held: Iterable[PageRange], layout: MemoryLayout) -> tuple[int, str, str] | None:
    """The first error of ranges of a layout as (index, field, problem), or None.

    Each range lies in its region and is not empty. Ranges ascend and do not overlap.
    """
    after = (0, 0)
    for index, one in enumerate(held):
        if not 0 <= one.region < len(layout.regions):
            return index, "region", f"{one.region} is not one of {len(layout.regions)} regions"
        pages = layout.regions[one.region].size // PAGE_4K
        if one.count < 1:
            return index, "count", f"{one.count} is not positive"
        if one.page < 0 or one.page + one.count > pages:
            return index, "page", f"{one.page} + {one.count} pages end beyond the region's {pages}"
        if (one.region, one.page) < after:
            return index, "page", f"{one.page} of region {one.region} lies below the end of the range before"
        after = (one.region, one.page + one.count)
    return None
