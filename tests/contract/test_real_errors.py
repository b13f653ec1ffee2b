"""Pagers on a host with bad frames. `make test-kernels` runs these tests; elsewhere they cost the host memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.contract.destination_rig import Destination, destination_of
from tests.support.contract.lanes import Frame, Kind
from tests.support.contract.page_source import FIRST_PAGES, PAGES, expected
from tests.support.contract.real_errors import (
    EARLY_KILL,
    PAGE,
    SOFT_OFFLINE,
    fail_frame,
    frame_at,
    mapping_of,
    soft_offline,
    why_not,
)
from tests.support.contract.source_rig import PAGES as PAGES_OF_4K
from tests.support.contract.source_rig import Source, bulk, check, demand, push, source_of
from tests.support.huge_pages import reserved

HUGE_PAGES = 4
BAD = {4, 5, 8}
BAD_PIECES = {5, 512 + 300}
"""A page of 4 KiB in each of two huge pages."""


ZERO = 3
"""A page of zeros."""


@pytest.fixture(autouse=True)
def real_frames() -> None:
    if why := why_not():
        pytest.skip(why)


@pytest.fixture(params=["late", "early"])
def host_policy(request: pytest.FixtureRequest, real_frames: None) -> Iterator[str]:
    """When the host tells processes of a bad frame: at a touch, or as soon as it finds it."""
    before = EARLY_KILL.read_text()
    EARLY_KILL.write_text(str(int(request.param == "early")))
    yield request.param
    EARLY_KILL.write_text(before)


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


@pytest.mark.parametrize("when", ["idle", "frozen"])
async def test_exactly_the_bad_frames_of_a_source_are_poison(source: Source, host_policy: str, when: str) -> None:
    """Also of a huge page only the bad 4 KiB. "frozen": the pager has mapped them already."""
    if when == "frozen":
        await source.freeze()
        check(await demand(source, 0, 4), set())
    bad = fail_pages(source)
    if when == "idle":
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


@pytest.fixture
async def ahead(uffd_poison: None, pager_program: str, vmm_child: Path, tmp_path: Path) -> AsyncIterator[Destination]:
    """A destination with all its memory allocated, before the first page arrives."""
    async with destination_of(pager_program, vmm_child, "memfd", tmp_path) as made:
        made.ahead = True
        await made.attach()
        yield made


def frame_ahead(destination: Destination, page: int) -> int:
    """The frame that waits for a page of the first region. The VMM does not map it yet."""
    return frame_at(
        destination.pager.pid, mapping_of(destination.pager.pid, "memfd", FIRST_PAGES[1] * PAGE) + page * PAGE
    )


async def all_as_the_source_has_it(destination: Destination, *but: int) -> None:
    for page in range(PAGES):
        if page not in but:
            assert await destination.vmm.touch(page) == expected(page), page


@pytest.mark.parametrize(
    ("how", "bad"),
    [("touch", (1,)), ("touch", (8, 15)), ("push", (1,)), ("push", (8, 9, 14)), ("push", (0, 62))],
    ids=str,
)
async def test_a_frame_that_goes_bad_before_its_page_comes_is_replaced(
    ahead: Destination, host_policy: str, how: str, bad: tuple[int, ...]
) -> None:
    """The source has the page still: the guest notices nothing."""
    for page in bad:
        fail_frame(frame_ahead(ahead, page))
    await ahead.connect()
    if how == "touch":
        for page in bad:
            assert await ahead.vmm.touch(page) == expected(page)
    await ahead.push()
    await ahead.event("all_present")
    await all_as_the_source_has_it(ahead)
    assert ahead.vmm.frames == [], "no memory error for the guest"
    assert (await ahead.status()).progress.poison == 0
    assert ahead.pager.poll() is None


async def test_a_bad_frame_under_zeros_that_were_pushed_is_poison(ahead: Destination) -> None:
    """Nobody can tell that the guest has written nothing to it."""
    fail_frame(frame_ahead(ahead, ZERO))
    await ahead.connect()
    await ahead.push()
    await ahead.event("all_present")
    assert await ahead.vmm.touch(ZERO) == "sigbus"
    assert [frame["origin"] for frame in ahead.vmm.frames] == ["destination"]
    await all_as_the_source_has_it(ahead, ZERO)


async def test_a_frame_that_goes_bad_under_a_page_that_came_is_the_vmms(ahead: Destination, host_policy: str) -> None:
    await ahead.connect()
    await ahead.push()
    await ahead.event("all_present")
    assert await ahead.vmm.touch(2) == expected(2)
    fail_frame(frame_at(ahead.vmm.process.pid, ahead.vmm.hva + 2 * PAGE))
    assert await ahead.vmm.touch(2) == "sigbus"
    await all_as_the_source_has_it(ahead, 2)
    assert ahead.pager.poll() is None
    await ahead.complete()


async def test_a_bad_frame_of_a_page_that_the_vmm_maps_no_longer_is_poison(ahead: Destination) -> None:
    """Its contents, which the guest may have written, are nowhere else."""
    await ahead.connect()
    await ahead.push()
    await ahead.event("all_present")
    assert await ahead.vmm.touch(2) == expected(2)
    frame = frame_at(ahead.vmm.process.pid, ahead.vmm.hva + 2 * PAGE)
    await ahead.vmm.advise(2, "dontneed")
    fail_frame(frame)
    assert await ahead.vmm.touch(2) == "sigbus"
    (told,) = ahead.vmm.frames
    assert (told["origin"], told["severity"], told["hva"]) == ("destination", "AR", ahead.vmm.hva + 2 * PAGE)
    assert await ahead.vmm.touch(2) == "sigbus", "again: the page is reported once"
    assert len(ahead.vmm.frames) == 1
    await all_as_the_source_has_it(ahead, 2)
    assert (await ahead.status()).progress.poison == 1


async def test_soft_offlined_frames_of_a_destination_are_replaced_unseen(ahead: Destination) -> None:
    if not SOFT_OFFLINE.exists():
        pytest.skip(f"this kernel has no {SOFT_OFFLINE}")
    soft_offline(frame_ahead(ahead, 1))
    await ahead.connect()
    assert await ahead.vmm.touch(1) == expected(1)
    soft_offline(frame_at(ahead.vmm.process.pid, ahead.vmm.hva + PAGE))
    await ahead.push()
    await ahead.event("all_present")
    await all_as_the_source_has_it(ahead)
    assert ahead.vmm.frames == []
