"""Which layout a VM's memory has on its destination: the source's, made of what the VMM there makes memory of. Pure."""

from __future__ import annotations

from dataclasses import replace

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryKind, MemoryLayout


def check_layout(layout: MemoryLayout) -> None:
    """Raises: VmferryError LAYOUT_MISMATCH that names the region and what is wrong with it."""
    if not layout.regions:
        raise VmferryError(Reason.LAYOUT_MISMATCH, "the layout has no memory regions.", "")
    problem = _problem(layout)
    if problem:
        raise VmferryError(Reason.LAYOUT_MISMATCH, f"{problem}.", "")


def destination_layout(source: MemoryLayout, kind: MemoryKind) -> MemoryLayout:
    """The regions of the source, where they are and as long as they are, in pages and backing of the destination.

    Raises: VmferryError LAYOUT_MISMATCH if the source's regions are not whole pages of the destination's size.
    """
    own = tuple(
        replace(region, page_size=kind.page_size or region.page_size, backing=kind.backing or region.backing)
        for region in source.regions
    )
    problem = _problem(MemoryLayout(own))
    if problem:
        raise VmferryError(
            Reason.LAYOUT_MISMATCH,
            f"the destination's VMM makes memory of pages of {kind.page_size} bytes, which the source's layout does "
            f"not fit: {problem}.",
            "Start the waiting VMM with the source's page size, or a smaller one.",
        )
    return MemoryLayout(own)


def _problem(layout: MemoryLayout) -> str:
    end = 0
    for number, region in enumerate(layout.regions):
        if region.page_size < 4096 or region.page_size & (region.page_size - 1):
            return f"region {number}: page size {region.page_size} is not a power of two from 4096 on"
        if region.size <= 0 or region.size % region.page_size or region.gpa % region.page_size:
            return f"region {number}: size {region.size} or GPA {region.gpa:#x} is not a multiple of {region.page_size}"
        if region.gpa < end:
            return f"region {number}: GPA {region.gpa:#x} is below {end:#x}, where the region before it ends"
        end = region.gpa + region.size
    return ""
