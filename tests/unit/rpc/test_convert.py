"""Values survive the way out and back; wrong ones are refused by the path of their field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import PAGE_SIZES, Backing, MemoryLayout, MemoryRegion, PageRange
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import Latency, PageProgress
from vmferry.rpc import convert as wire
from vmferry.units import GIB, MIB, Gpa
from vmferry.v1 import common_pb2 as pb

u64 = st.integers(0, 2**64 - 1)
floats = st.floats(0, 1e9)

entries = st.builds(
    LedgerEntry,
    gpa=u64.map(Gpa),
    origin=st.sampled_from(Origin),
    lsb=st.integers(1, 63),
    severity=st.none() | st.sampled_from(Severity),
    guest_visible=st.booleans(),
    hop=st.integers(0, 2**32 - 1),
    count=st.integers(1, 2**64 - 1),
    first_seen_us=st.integers(-(2**63), 2**63 - 1),
    last_seen_us=st.integers(-(2**63), 2**63 - 1),
)
progresses = st.builds(
    PageProgress,
    *[u64] * 11,
    first_touch=st.builds(Latency, u64, floats, floats, floats, floats),
)


@st.composite
def layouts(draw: st.DrawFn) -> MemoryLayout:
    regions, free_from = [], 0
    for _ in range(draw(st.integers(1, 5))):
        page = draw(st.sampled_from(PAGE_SIZES))
        gpa = -(-free_from // page) * page + page * draw(st.integers(0, 100))
        size = page * draw(st.integers(1, 1000))
        regions.append(MemoryRegion(Gpa(gpa), size, page, draw(st.sampled_from(Backing))))
        free_from = gpa + size
    return MemoryLayout(tuple(regions))


@given(layouts())
def test_layout_there_and_back(layout: MemoryLayout) -> None:
    message = pb.MemoryLayout.FromString(wire.layout_to_pb(layout).SerializeToString())
    assert wire.layout_from_pb(message) == layout


@st.composite
def layouts_with_held(draw: st.DrawFn) -> tuple[MemoryLayout, list[PageRange]]:
    layout, held = draw(layouts()), []
    for index, one in enumerate(layout.regions):
        cuts = sorted(draw(st.sets(st.integers(0, one.size // 4096), max_size=8)))
        held += [PageRange(index, first, last - first) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]
    return layout, held


@given(layouts_with_held())
def test_held_memory_there_and_back(both: tuple[MemoryLayout, list[PageRange]]) -> None:
    layout, held = both
    messages = [pb.PageRange.FromString(one.SerializeToString()) for one in wire.ranges_to_pb(held)]
    assert wire.held_from_pb(messages, layout) == tuple(held)
    if held:
        with pytest.raises(VmferryError, match=r"held\[\d+\]\.page"):
            wire.held_from_pb([*messages, messages[0]], layout)


@given(entries)
def test_memory_error_there_and_back(entry: LedgerEntry) -> None:
    message = pb.MemoryError.FromString(wire.error_to_pb(entry).SerializeToString())
    assert wire.error_from_pb(message) == entry


@given(progresses)
def test_progress_there_and_back(progress: PageProgress) -> None:
    message = pb.PageProgress.FromString(wire.progress_to_pb(progress).SerializeToString())
    assert wire.progress_from_pb(message) == progress


def region(gpa: int = 0, size: int = MIB, page_size: int = 4096) -> MemoryRegion:
    return MemoryRegion(Gpa(gpa), size, page_size, Backing.MEMFD)


@pytest.mark.parametrize(
    ("regions", "field"),
    [
        ((), "layout.regions"),
        ((region(page_size=8192),), "layout.regions[0].page_size"),
        ((region(size=0),), "layout.regions[0].size"),
        ((region(size=4097),), "layout.regions[0].size"),
        ((region(gpa=1),), "layout.regions[0].gpa"),
        ((region(), region(gpa=MIB - 4096)), "layout.regions[1].gpa"),
        ((region(gpa=2**64 - MIB, size=2 * MIB),), "layout.regions[0].size"),
        ((region(), region(gpa=GIB, size=3 * MIB, page_size=2 * MIB)), "layout.regions[1].size"),
    ],
)
def test_wrong_layout_names_the_field(regions: tuple[MemoryRegion, ...], field: str) -> None:
    with pytest.raises(VmferryError) as caught:
        wire.layout_from_pb(wire.layout_to_pb(MemoryLayout(regions)))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.message.startswith(f"{field}: ")


def test_unspecified_enums_are_refused() -> None:
    with pytest.raises(VmferryError, match=r"ledger\[3\]\.origin"):
        wire.error_from_pb(pb.MemoryError(gpa=4096), "ledger[3]")
    with pytest.raises(VmferryError, match=r"layout\.regions\[0\]\.backing"):
        wire.layout_from_pb(pb.MemoryLayout(regions=[pb.MemoryRegion(size=4096, page_size=4096)]))


def test_every_enum_value_has_its_number() -> None:
    assert len(pb.Backing.values()) - 1 == len(Backing)
    assert len(pb.ErrorOrigin.values()) - 1 == len(Origin)
    assert len(pb.Severity.values()) - 1 == len(Severity)


def test_unset_numbers_mean_a_4k_page_once() -> None:
    entry = wire.error_from_pb(pb.MemoryError(gpa=4096, origin=pb.ERROR_ORIGIN_READ))
    assert (entry.lsb, entry.count) == (12, 1)
