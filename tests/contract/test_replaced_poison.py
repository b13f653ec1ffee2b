"""A guest is reset: poison that its VMM has replaced by fresh memory is forgotten, and no other."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.contract.destination_rig import Destination, gpa_of
from tests.support.contract.page_source import Poison, expected
from vmferry.v1 import common_pb2

READ = Poison(common_pb2.ERROR_ORIGIN_READ)
BAD, OTHER, UNTOUCHED = 3, 5, 7
TRIES = 20
"""On a machine that is busy the word may come too late."""
WAYS = ["give back", "replace"]
"""As QEMU 10.0 does, and as QEMU 7.2 does."""


async def bad_pages(destination: Destination, by_process: bool = False) -> None:
    """The guest has touched two bad pages; a third is not known to it."""
    destination.source.poison = dict.fromkeys((BAD, OTHER, UNTOUCHED), READ)
    await destination.attach(by_process)
    await destination.connect()
    await destination.push()
    await destination.event("all_present")
    assert [await destination.vmm.touch(page) for page in (BAD, OTHER)] == ["sigbus", "sigbus"]


async def put_fresh_memory(destination: Destination, page: int, way: str) -> None:
    if way == "give back":
        await destination.vmm.give_back(page)
        await destination.vmm.advise(page, "dontneed")
    else:
        await destination.vmm.advise(page, "replace")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ended", [False, True], ids=["pages on the way", "after the end"])
async def test_replaced_page_reads_as_fresh_memory_and_the_others_stay_poisoned(
    destination: Destination, way: str, ended: bool
) -> None:
    await bad_pages(destination)
    if ended:
        assert await destination.complete() == 3
    await put_fresh_memory(destination, BAD, way)
    assert await destination.forget_replaced() == 1
    event = (await destination.event("pages_replaced")).pages_replaced
    assert [(page.gpa, page.lsb) for page in event.pages] == [(gpa_of(BAD), 12)]
    assert await destination.vmm.touch(BAD) == "byte:0"
    assert [await destination.vmm.touch(page) for page in (OTHER, UNTOUCHED)] == ["sigbus", "sigbus"]
    assert await destination.vmm.touch(1) == expected(1)
    assert await destination.complete() == 2
    assert await destination.forget_replaced() == 0


@pytest.mark.parametrize("advice", ["remove", "dontneed"])
async def test_page_that_only_the_guest_gave_back_stays_poisoned(destination: Destination, advice: str) -> None:
    """A balloon is no reset. A hole in a file leaves the marker."""
    if advice == "remove" and destination.backing == "anonymous":
        pytest.skip("anonymous memory has no file to make a hole in")
    await bad_pages(destination)
    await destination.vmm.advise(BAD, advice)
    if advice == "dontneed":
        assert await destination.vmm.touch(BAD) == "sigbus"
    assert await destination.forget_replaced() == 0
    assert await destination.vmm.touch(BAD) == "sigbus"


async def test_fresh_memory_that_goes_bad_again_is_poison_again(destination: Destination) -> None:
    await bad_pages(destination)
    await put_fresh_memory(destination, BAD, "give back")
    assert await destination.forget_replaced() == 1
    assert await destination.mark(BAD, guest_visible=True) == (1, 0, 0)
    assert await destination.vmm.touch(BAD) == "sigbus"


async def test_touch_between_the_reset_and_its_word_waits_for_it(destination: Destination) -> None:
    """QEMU says RESET to the daemon while its vCPUs run already."""
    await bad_pages(destination, by_process=True)
    await destination.complete()
    for _ in range(TRIES):
        await put_fresh_memory(destination, BAD, "give back")
        act, _ = await destination.vmm.start_touch(BAD)
        if await destination.forget_replaced():
            assert await destination.vmm.touched(act) == "byte:0"
            return
        assert await destination.vmm.touched(act) == "sigbus", "the word came too late"
    pytest.fail("no word came in time")


async def test_touch_without_any_word_of_a_reset_meets_the_poison(destination: Destination) -> None:
    await bad_pages(destination, by_process=True)
    await put_fresh_memory(destination, BAD, "give back")
    acts = [(await destination.vmm.start_touch(BAD))[0] for _ in range(2)]
    assert await asyncio.gather(*map(destination.vmm.touched, acts)) == ["sigbus", "sigbus"]
    assert await destination.forget_replaced() == 0
