"""A source on a host with bad frames. `make test-kernels` runs these tests; elsewhere they cost the host memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.contract.lanes import Frame, Kind
from tests.support.contract.real_errors import PAGE, SOFT_OFFLINE, fail_frame, frame_at, soft_offline
from tests.support.contract.source_rig import PAGES as PAGES_OF_4K
from tests.support.contract.source_rig import Source, bulk, check, demand, push, source_of
from tests.support.huge_pages import reserved

pytestmark = pytest.mark.usefixtures("real_frames")

HUGE_PAGES = 4
BAD = {4, 5, 8}
BAD_PIECES = {5, 512 + 300}
"""A page of 4 KiB in each of two huge pages."""


@pytest.fixture
def huge_pages(real_frames: None) -> Iterator[None]:
    with reserved(HUGE_PAGES):
        yield


@pytest.fixture(params=["anonymous", "memfd", "hugetlb"])
async def source(
    request: pytest.FixtureRequest, huge_pages: None, pager_program: str, tmp_path: Path
) -> AsyncIterator[Source]:
    async with source_of(pager_program, request.param, tmp_path) as made:
        yield made


def fail_pages(source: Source) -> set[int]:
    """Pages of 4 KiB whose frames are bad from now on."""
    bad = BAD if source.pages == PAGES_OF_4K else BAD_PIECES
    for page in bad:
        fail_frame(frame_at(source.vmm.pid, source.hva + page * PAGE))
    return bad


def poisoned(pages: dict[int, Frame]) -> set[int]:
    return {page for page, frame in pages.items() if frame.kind == Kind.POISON}


@pytest.mark.parametrize("when", ["idle", "frozen", "thawed"])
async def test_exactly_the_bad_frames_of_a_source_are_poison(source: Source, host_policy: str, when: str) -> None:
    """Also of a huge page only the bad 4 KiB. "frozen": the pager has mapped them already. "thawed": the VM ran again
    after a move that failed."""
    if when != "idle":
        await source.freeze()
        check(await demand(source, 0, 4), set())
    if when == "thawed":
        await source.thaw()
    bad = fail_pages(source)
    if when != "frozen":
        await source.freeze()
    for way in (demand, push):
        got = await way(source, 0, source.pages)
        assert poisoned(got) == bad, way.__name__
        assert len(got) == source.pages
        check(got, bad)
    assert source.pager.poll() is None, "the pager lives on"


async def test_a_frame_that_goes_bad_while_it_is_pushed_is_poison_or_was_sent(source: Source) -> None:
    await source.freeze()
    async with source.opened(bulk((0, source.pages))) as lane:
        first = await lane.pages(1)
        bad = fail_pages(source)
        rest = await lane.pages(0)
    check(first | rest, poisoned(rest))
    assert poisoned(rest) <= bad
    assert poisoned(await push(source, 0, source.pages)) == bad
    assert source.pager.poll() is None


async def test_soft_offlined_frames_of_a_source_are_sent_as_ever(source: Source) -> None:
    if not SOFT_OFFLINE.exists():
        pytest.skip(f"this kernel has no {SOFT_OFFLINE}")
    await source.freeze()
    check(await demand(source, 0, 8), set())
    for page in BAD:
        soft_offline(frame_at(source.vmm.pid, source.hva + page * PAGE))
    check(await demand(source, 0, 16), set())
    check(await push(source, 0, source.pages), set())


async def test_a_bad_frame_of_an_anonymous_huge_page_costs_the_huge_page(
    huge_pages: None, pager_program: str, tmp_path: Path
) -> None:
    """No file gives the other pieces, and no system call reads them."""
    async with source_of(pager_program, "anonymous hugetlb", tmp_path) as source:
        fail_frame(frame_at(source.vmm.pid, source.hva + 5 * PAGE))
        await source.freeze()
        bad = set(range(512))
        for way in (demand, push):
            got = await way(source, 0, source.pages)
            assert poisoned(got) == bad, way.__name__
            check(got, bad)
        assert source.pager.poll() is None
