"""Where a QEMU has its guest's memory, read from its monitors' answers. Pure.

The blocks of memory backends (`query-memdev`) are guest RAM and become the regions of the layout. All other RAM
blocks (firmware, option ROMs, ACPI tables, VGA memory) are small and travel with the device state.

A block may be mapped at several places (below and above 4 GiB). VGA, ROMs and SMRAM cover parts of it. They differ
between the hosts and change while the guest runs. So a region is a whole stretch of a block with one distance between
GPA and offset.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

from vmferry.errors import Reason, VmferryError
from vmferry.units import GIB, KIB, MIB, Gpa, Hva

_VIEW = re.compile(r"^FlatView #\d+$", re.MULTILINE)
_SYSTEM = re.compile(r'^ AS "memory", root: system$', re.MULTILINE)
_RUN = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (.+?)(?: @([0-9a-f]{16}))?(?: KVM)?$", re.MULTILINE
)
_BLOCK = re.compile(
    r"^ *(\S.*?) +(\d+) ([KMG])iB +0x[0-9a-f]{16} 0x([0-9a-f]{16}) 0x([0-9a-f]{16})(?: 0x([0-9a-f]{16}))?(?: +r[ow])?$",
    re.MULTILINE,
)
_HVA = re.compile(r"^Host virtual address for 0x[0-9a-f]+ \((.+)\) is 0x([0-9a-f]+)\s*$")
_UNIT = {"K": KIB, "M": MIB, "G": GIB}


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A RAM block of QEMU. `hva` is None where this QEMU does not tell it (before 8.2)."""

    name: str
    page_size: int
    used: int
    total: int
    hva: Hva | None


@dataclass(frozen=True, slots=True)
class MappedRun:
    """A stretch of a block that the guest sees now."""

    gpa: Gpa
    size: int
    block: str
    offset: int


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """A stretch of a block of guest RAM; the layout's region. `seen` is a GPA in it that the guest sees as this RAM."""

    gpa: Gpa
    size: int
    block: str
    offset: int
    page_size: int
    seen: Gpa


def mapped_runs(text: str) -> list[MappedRun]:
    """The RAM that vCPUs see, from `info mtree -f`. Raises: VmferryError VMM_PROTOCOL."""
    for view in _VIEW.split(text)[1:]:
        if _SYSTEM.search(view):
            return [
                MappedRun(Gpa(int(first, 16)), int(last, 16) + 1 - int(first, 16), block, int(offset or "0", 16))
                for first, last, block, offset in _RUN.findall(view)
                if int(last, 16) >= int(first, 16)
            ]
    raise _strange("info mtree -f", 'shows no view of the address space "memory"')


def ram_blocks(text: str) -> dict[str, RamBlock]:
    """All RAM blocks by name, from `info ramblock`. Raises: VmferryError VMM_PROTOCOL."""
    blocks = {
        name: RamBlock(
            name, int(count) * _UNIT[unit], int(used, 16), int(total, 16), Hva(int(hva, 16)) if hva else None
        )
        for name, count, unit, used, total, hva in _BLOCK.findall(text)
    }
    if not blocks:
        raise _strange("info ramblock", "names no block")
    for block in blocks.values():
        if not 0 < block.used <= block.total:
            raise _strange("info ramblock", f"gives block {block.name} {block.used} of {block.total} bytes")
    return blocks


def host_address(text: str, block: str) -> Hva:
    """The answer of `gpa2hva`. Raises: VmferryError VMM_PROTOCOL if it is of another block."""
    found = _HVA.match(text)
    if found is None or found[1] != block:
        raise _strange("gpa2hva", f"answers {text.strip()!r}, not an address in {block}")
    return Hva(int(found[2], 16))


def backend_block(backend: str, blocks: Collection[str]) -> str | None:
    """The block of a memory backend: named by its id, or by its path on machine types of the time before 4.0."""
    return next((name for name in (backend, f"/objects/{backend}") if name in blocks), None)


def region_address(region: GuestRegion, seen: Hva) -> Hva:
    """The region's first byte. `seen`: the address of `region.seen`."""
    return Hva(seen - (region.seen - region.gpa))


def guest_regions(runs: Iterable[MappedRun], blocks: Iterable[RamBlock]) -> list[GuestRegion]:
    """The regions of these blocks, ascending by GPA. Raises: VmferryError VMM_REFUSED where a block is mapped twice."""
    by_name: dict[str, list[MappedRun]] = {}
    for run in sorted(runs, key=lambda run: run.offset):
        by_name.setdefault(run.block, []).append(run)
    regions = [region for block in blocks for region in _of_block(block, by_name.get(block.name, []))]
    return sorted(regions, key=lambda region: region.gpa)


def _of_block(block: RamBlock, runs: list[MappedRun]) -> list[GuestRegion]:
    if any(after.offset < before.offset + before.size for before, after in pairwise(runs)):
        raise VmferryError(
            Reason.VMM_REFUSED,
            f"RAM block {block.name} is seen by the guest at two addresses.",
            "Remove the device that shows guest RAM a second time.",
        )
    starts = [run for before, run in pairwise([None, *runs]) if run and _shift(before) != _shift(run)]
    regions = []
    for number, run in enumerate(starts):
        begin = run.offset if number else 0  # the part before the first run is covered
        end = starts[number + 1].offset if number + 1 < len(starts) else block.total
        gpa = Gpa(run.gpa - run.offset + begin)
        if gpa < 0 or end > block.total or run.offset + run.size > end:
            raise _strange("info mtree -f", f"maps block {block.name} beyond its {block.total:#x} bytes")
        regions.append(GuestRegion(gpa, end - begin, block.name, begin, block.page_size, run.gpa))
    return regions


def _shift(run: MappedRun | None) -> int | None:
    return None if run is None else run.gpa - run.offset


def _strange(command: str, what: str) -> VmferryError:
    return VmferryError(
        Reason.VMM_PROTOCOL, f"QEMU's answer to {command!r} {what}.", "Report the QEMU version: this one is not known."
    )
