"""The layout of a VM's memory on its destination: the source's regions in the destination's page size and backing."""

from __future__ import annotations

from dataclasses import replace

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryKind, MemoryLayout, layout_problem


def check_layout(layout: MemoryLayout) -> None:
    """Raises: VmferryError LAYOUT_MISMATCH that names the field and its error."""
    problem = layout_problem(layout)
    if problem is not None:
        raise VmferryError(
            Reason.LAYOUT_MISMATCH,
            f"layout.{problem[0]}: {problem[1]}.",
            "The source's VMM declares this layout in its hello: correct it there.",
        )


def destination_layout(source: MemoryLayout, kind: MemoryKind) -> MemoryLayout:
    """The source's regions at the same addresses and sizes, with the page size and backing of the destination.

    Raises: VmferryError LAYOUT_MISMATCH if the source's regions are not whole pages of the destination's size.
    """
    own = MemoryLayout(
        tuple(
            replace(region, page_size=kind.page_size or region.page_size, backing=kind.backing or region.backing)
            for region in source.regions
        )
    )
    problem = layout_problem(own)
    if problem is not None:
        raise VmferryError(
            Reason.LAYOUT_MISMATCH,
            f"the destination's VMM makes memory of pages of {kind.page_size} bytes, which the source's layout does "
            f"not fit: layout.{problem[0]}: {problem[1]}.",
            "Start the waiting VMM with the source's page size, or a smaller one.",
        )
    return own
