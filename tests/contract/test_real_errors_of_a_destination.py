"""A destination on a host with bad frames. `make test-kernels` runs these tests: elsewhere they cost memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.contract.destination_rig import (
    HUGE_PAGES,
    PIECES,
    Destination,
    destination_of,
    is_huge,
)
from tests.support.contract.page_source import FIRST_PAGES, PAGES, expected
from tests.support.contract.real_errors import PAGE, SOFT_OFFLINE, fail_frame, frame_at, mapping_of, soft_offline
from tests.support.huge_pages import reserved

pytestmark = pytest.mark.usefixtures("real_frames", "uffd_poison")

ZERO = 3
"""A page of zeros."""
POOL = 2 * HUGE_PAGES
"""Huge pages for the memory, and for those that take the place of bad ones."""


@pytest.fixture(params=["anonymous", "memfd", "anonymous hugetlb", "hugetlb"])
async def destination(
    request: pytest.FixtureRequest, real_frames: None, pager_program: str, vmm_child: Path, tmp_path: Path
) -> AsyncIterator[Destination]:
    """One of each backing that waits for its VMM."""
    with ExitStack() as stack:
        if is_huge(request.param):
            stack.enter_context(reserved(POOL))
        async with destination_of(pager_program, vmm_child, request.param, tmp_path) as made:
            yield made


def some_pages(destination: Destination) -> list[int]:
    """Pages of 4 KiB with contents, each in a huge page of its own if pages are huge."""
    return (
        [number * PIECES + 100 + number for number in range(HUGE_PAGES)]
        if is_huge(destination.backing)
        else [1, 2, 5, 70]
    )


def fail_page(destination: Destination, page: int) -> None:
    """The VMM's frame of a page is bad from now on; no thread has touched it."""
    fail_frame(frame_at(destination.vmm.process.pid, destination.vmm.hva + page * PAGE))


async def test_bad_frames_under_pages_that_came_are_the_vmms(destination: Destination, host_policy: str) -> None:
    """Pushed, touched by the guest, and after the end: the host signals the VMM, and the pager has no part in it."""
    await destination.everything()
    pushed, touched, after, good = some_pages(destination)
    assert await destination.vmm.touch(touched) == expected(touched)
    for page in (pushed, touched):
        fail_page(destination, page)
        assert await destination.vmm.touch(page) == "sigbus"
    assert await destination.complete() == 0, "no page is guarded"
    fail_page(destination, after)
    assert await destination.vmm.touch(after) == "sigbus"
    assert await destination.vmm.touch(good) == expected(good)
    assert destination.vmm.frames == []
    assert destination.pager.poll() is None


async def test_a_bad_page_that_the_vmm_reports_stays_poison_when_it_is_given_back(destination: Destination) -> None:
    """Before the end and after it. Without a marker the page would read as zeros."""
    await destination.everything()
    before, after, good, _ = some_pages(destination)
    for page in (before, after):
        fail_page(destination, page)
        assert await destination.vmm.touch(page) == "sigbus"
        assert await destination.mark(page, guest_visible=True) == (1, 0, 0)
        await destination.vmm.give_back(page)
        assert await destination.vmm.touch(page) == "sigbus"
        assert await destination.vmm.touch(page) == "sigbus"
        assert await destination.complete() == 1 + (page == after)
    assert await destination.vmm.touch(good) == expected(good)
    assert destination.vmm.frames == [], "the VMM knew them"


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
