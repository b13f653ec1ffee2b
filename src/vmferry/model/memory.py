"""Guest memory: a layout of regions, the rules for a layout, and ranges of pages. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.units import GIB, MIB, PAGE_1G, PAGE_2M, PAGE_4K, Gpa

PAGE_SIZES = (PAGE_4K, PAGE_2M, PAGE_1G)
"""The page sizes of x86-64, the only ones that userfaultfd and hugetlbfs serve there."""
PAGE_SIZES_TEXT = f"{PAGE_4K}, {PAGE_2M // MIB} MiB or {PAGE_1G // GIB} GiB"
ADDRESS_LIMIT = 1 << 64
"""No region ends beyond this address."""


class Backing(StrEnum):
    """The kind of memory behind a region in its VMM."""

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of guest memory; `size` and `page_size` in bytes."""

    gpa: Gpa
    size: int
    page_size: int
    backing: Backing


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """The page size and backing that a destination's VMM uses. None: the same as on the source."""

    page_size: int | None = None
    backing: Backing | None = None


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """Regions in ascending GPA order without overlap. Both hosts have the same GPAs and sizes."""

    regions: tuple[MemoryRegion, ...]

    def contains(self, gpa: int) -> bool:
        """Whether a region holds this address."""
        return any(region.gpa <= gpa < region.gpa + region.size for region in self.regions)


@dataclass(frozen=True, slots=True)
class PageRange:
    """A half-open run of 4 KiB pages of one region (`PageRange` in common.proto), at any page size of the region."""

    region: int
    page: int
    count: int


def layout_problem(layout: MemoryLayout) -> tuple[str, str] | None:
    """The first error of a layout as (field, problem), or None.

    A layout has at least one region. Regions ascend, do not overlap, are aligned to their page size, and end at 2^64 at
    the latest. The pager checks the same rules (`pager/src/layout/mod.rs`).
    """
    if not layout.regions:
        return "regions", "is empty"
    free_from = 0
    for index, region in enumerate(layout.regions):
        problem = _region_problem(region, free_from)
        if problem is not None:
            return f"regions[{index}].{problem[0]}", problem[1]
        free_from = region.gpa + region.size
    return None


def _region_problem(region: MemoryRegion, free_from: int) -> tuple[str, str] | None:
    if region.page_size not in PAGE_SIZES:
        return "page_size", f"{region.page_size} is not {PAGE_SIZES_TEXT}"
    if region.size <= 0 or region.size % region.page_size:
        return "size", f"{region.size:#x} is not a positive multiple of page_size {region.page_size:#x}"
    if region.gpa < 0 or region.gpa % region.page_size:
        return "gpa", f"{region.gpa:#x} is not aligned to page_size {region.page_size:#x}"
    if region.gpa < free_from:
        return "gpa", f"{region.gpa:#x} lies below {free_from:#x}, the end of the region before"
    if region.gpa + region.size > ADDRESS_LIMIT:
        return "size", f"{region.size:#x} ends beyond 2^64"
    return None


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """A limit on memory, and the bytes that can still be taken below it. `where` names it in a sentence."""

    where: str
    limit: int
    bytes: int
    remedy: str = "Raise this limit, free memory there, or take another destination."
