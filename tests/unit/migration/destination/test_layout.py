"""The destination's layout has the source's regions, in the page size and backing of the VMM there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.migration.destination.layout import check_layout, destination_layout
from vmferry.model.memory import Backing, MemoryKind, MemoryLayout, MemoryRegion
from vmferry.model.migration import Phase
from vmferry.testing.host import Pair
from vmferry.testing.vmm import LAYOUT
from vmferry.units import GIB, MIB, PAGE_1G, PAGE_2M, PAGE_4K, Gpa

SOURCE = MemoryLayout(
    (
        MemoryRegion(Gpa(0), 64 * MIB, PAGE_4K, Backing.ANONYMOUS),
        MemoryRegion(Gpa(4 * GIB), 2 * GIB, PAGE_2M, Backing.MEMFD),
    )
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page_size": 3000}, r"layout\.regions\[0\]\.page_size: 3000 is not 4096, 2 MiB or 1 GiB"),
        ({"page_size": 2 * PAGE_4K}, r"page_size: 8192 is not"),
        ({"size": 5000}, r"layout\.regions\[0\]\.size: 0x1388"),
        ({"gpa": Gpa(100)}, r"layout\.regions\[0\]\.gpa: 0x64"),
    ],
)
def test_a_layout_that_cannot_be(change: dict[str, int], words: str) -> None:
    region = replace(LAYOUT.regions[0], **change)  # type: ignore[arg-type]
    with pytest.raises(VmferryError, match=words) as caught:
        check_layout(MemoryLayout((region,)))
    assert caught.value.reason is Reason.LAYOUT_MISMATCH


def test_a_layout_whose_regions_overlap() -> None:
    region = MemoryRegion(Gpa(0), 8192, 4096, Backing.MEMFD)
    with pytest.raises(VmferryError, match=r"layout\.regions\[1\]\.gpa: 0x1000 lies below 0x2000"):
        check_layout(MemoryLayout((region, replace(region, gpa=Gpa(4096)))))
    with pytest.raises(VmferryError, match=r"layout\.regions: is empty"):
        check_layout(MemoryLayout(()))


@pytest.mark.parametrize(
    ("kind", "made_of"),
    [
        (MemoryKind(), [(PAGE_4K, Backing.ANONYMOUS), (PAGE_2M, Backing.MEMFD)]),
        (MemoryKind(PAGE_2M), [(PAGE_2M, Backing.ANONYMOUS), (PAGE_2M, Backing.MEMFD)]),
        (MemoryKind(backing=Backing.MEMFD), [(PAGE_4K, Backing.MEMFD), (PAGE_2M, Backing.MEMFD)]),
        (MemoryKind(PAGE_4K, Backing.ANONYMOUS), [(PAGE_4K, Backing.ANONYMOUS)] * 2),
    ],
)
def test_regions_stay_and_get_the_backing_of_the_destination(
    kind: MemoryKind, made_of: list[tuple[int, Backing]]
) -> None:
    there = destination_layout(SOURCE, kind).regions
    assert [(region.gpa, region.size) for region in there] == [(region.gpa, region.size) for region in SOURCE.regions]
    assert [(region.page_size, region.backing) for region in there] == made_of


def test_regions_that_are_no_whole_pages_of_the_destination() -> None:
    with pytest.raises(VmferryError, match=r"pages of 1073741824 bytes.*regions\[0\]\.size: 0x4000000") as caught:
        destination_layout(SOURCE, MemoryKind(PAGE_1G))
    assert caught.value.reason is Reason.LAYOUT_MISMATCH
    assert caught.value.remedy


async def test_the_destinations_pager_expects_the_layout_of_its_vmm(pair: Pair) -> None:
    pair.a.pagers.arrives = pair.b.pagers.arrives = False
    pair.destination.make_memory_of(MemoryKind(PAGE_2M, Backing.ANONYMOUS))
    await pair.service.create("m1", "web", "b")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))
    own = replace(LAYOUT.regions[0], page_size=PAGE_2M, backing=Backing.ANONYMOUS)
    assert pair.a.pagers.running["m1-source"].layout == LAYOUT
    assert pair.b.pagers.running["m1-destination"].layout == MemoryLayout((own,))
    assert pair.destination.identity.layout == MemoryLayout((own,))


async def test_pages_that_do_not_fit_are_refused_before_anything_is_made(pair: Pair) -> None:
    pair.destination.make_memory_of(MemoryKind(PAGE_1G))
    await pair.service.create("m1", "web", "b")
    job = await pair.a.job_where("m1")
    assert (job.phase, job.reason_code) == (Phase.FAILED, Reason.LAYOUT_MISMATCH)
    assert "vmm.stop" not in pair.a.script.transcript
    assert "pagers.start" not in pair.b.script.transcript
    assert pair.source.runs
