"""Held memory: how much it is, how long it may take, and what is wrong with it."""

from __future__ import annotations

import pytest

from vmferry.model.allocation import allocation_s, held_bytes, held_problem, layout_bytes
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion, PageRange
from vmferry.units import GIB, MIB, PAGE_2M, PAGE_4K, Gpa

LAYOUT = MemoryLayout(
    (
        MemoryRegion(Gpa(0), MIB, PAGE_4K, Backing.MEMFD),
        MemoryRegion(Gpa(GIB), 4 * MIB, PAGE_2M, Backing.MEMFD),
    )
)


def test_sizes_are_in_pages_of_4_kib_whatever_the_regions_page() -> None:
    assert held_bytes([PageRange(0, 0, 256), PageRange(1, 512, 512)]) == 3 * MIB
    assert layout_bytes(LAYOUT) == 5 * MIB
    assert held_bytes([]) == 0


def test_deadlines_grow_with_memory() -> None:
    assert allocation_s(0) == 0
    assert allocation_s(64 * GIB) == 256


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        ([], None),
        ([PageRange(0, 0, 256), PageRange(1, 0, 1024)], None),
        ([PageRange(0, 0, 1), PageRange(0, 1, 1)], None),
        ([PageRange(0, 256, 1)], (0, "page", "256 + 1 pages end beyond the region's 256")),
        ([PageRange(1, 1, 1024)], (0, "page", "1 + 1024 pages end beyond the region's 1024")),
        ([PageRange(2, 0, 1)], (0, "region", "2 is not one of 2 regions")),
        ([PageRange(0, 3, 0)], (0, "count", "0 is not positive")),
        (
            [PageRange(1, 0, 1), PageRange(0, 0, 1)],
            (1, "page", "0 of region 0 lies below the end of the range before"),
        ),
        (
            [PageRange(0, 0, 2), PageRange(0, 1, 1)],
            (1, "page", "1 of region 0 lies below the end of the range before"),
        ),
    ],
)
def test_ranges_lie_in_their_region_and_ascend(held: list[PageRange], problem: tuple[int, str, str] | None) -> None:
    assert held_problem(held, LAYOUT) == problem
