"""Guest memory as a layout of regions, and ranges of its pages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.units import Gpa


class Backing(StrEnum):
    """What a region is made of in the VMM that owns it."""

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
    """What a destination's VMM makes memory of; None: of what it is on the source."""

    page_size: int | None = None
    backing: Backing | None = None


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """Regions in ascending, non-overlapping GPA order: on both hosts of the same GPAs and sizes."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class PageRange:
    """A half-open run of 4 KiB pages of one region (`PageRange` in common.proto), whatever the region's page size."""

    region: int
    page: int
    count: int
