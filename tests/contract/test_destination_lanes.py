"""A destination's pager with a source that breaks the framing, or breaks off in it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.support.contract.destination_rig import Destination
from tests.support.contract.lanes import MOST_DATA_PAGES, PAGE, Frame, Kind, failed
from tests.support.contract.page_source import FIRST_PAGES, PAGES, Poison, expected
from tests.support.contract.vmm_child import PATIENCE_S
from vmferry.v1 import common_pb2, pager_pb2

UP, DOWN = pager_pb2.LINK_STATE_UP, pager_pb2.LINK_STATE_DOWN
READ = Poison(common_pb2.ERROR_ORIGIN_READ)
GARBAGE = b"\xee" * PAGE
"""Of no page of this source."""
LANES = pytest.mark.parametrize("lane", ["urgent", "bulk"])


async def mislead(destination: Destination, lane: str, said: bytes) -> int:
    """The source sends this instead of page 1, while a thread waits for it, or instead of the first pushed pages.

    Returns the act of the thread, 0 if there is none.
    """
    source, act = destination.source, 0
    source.misled.clear()
    if lane == "urgent":
        source.instead_of_answer = [said]
        act, _ = await destination.vmm.start_touch(1)
    else:
        source.instead_of_push = [said]
        await destination.push(1)
    await asyncio.wait_for(source.misled.wait(), PATIENCE_S)
    return act


async def check_everything(destination: Destination, except_for: dict[int, str]) -> None:
    """Once the link is up again all that is missing arrives, whole."""
    await destination.connect()
    await destination.push()
    await destination.event("all_present")
    for page in range(PAGES):
        assert await destination.vmm.touch(page) == except_for.get(page, expected(page)), page


@LANES
@pytest.mark.parametrize(
    ("said", "words"),
    [
        pytest.param(Frame(77, 0, 1, 1), ("kind", "77"), id="unknown kind"),
        pytest.param(Frame(0), ("kind", "0"), id="kind 0"),
        pytest.param(Frame(Kind.ZERO, 77, 1, 1), ("region 77", "layout"), id="no such region"),
        pytest.param(Frame(Kind.ZERO, 0, 0xABCDE, 1), (f"{0xABCDE}", "layout"), id="no such page"),
        pytest.param(Frame(Kind.ZERO, 0, 1, FIRST_PAGES[1]), ("64", "layout"), id="zeros beyond the region"),
        pytest.param(Frame(Kind.POISON, 0, 2**64 - 1, 2), (f"{2**64 - 1}", "layout"), id="poison beyond all numbers"),
        pytest.param(
            Frame(Kind.DATA, 0, FIRST_PAGES[1] - 1, 2, body=2 * GARBAGE), ("63", "layout"), id="data beyond the region"
        ),
        pytest.param(Frame(Kind.DATA, 0, 1, 0), ("DATA", "0"), id="no data"),
        pytest.param(Frame(Kind.DATA, 0, 0, MOST_DATA_PAGES + 1), ("DATA", "65"), id="too much data"),
        pytest.param(Frame(Kind.DATA, 0, 1, 2**32 - 1), ("DATA", f"{2**32 - 1}"), id="far too much data"),
        pytest.param(Frame(Kind.POISON, 0, 1, 1, origin=99), ("origin", "99"), id="unknown origin"),
    ],
)
async def test_nonsense_takes_the_link_down(
    anonymous: Destination, lane: str, said: Frame, words: tuple[str, ...]
) -> None:
    await anonymous.attach()
    await anonymous.connect()
    act = await mislead(anonymous, lane, said.encode())
    down = await anonymous.link_event(DOWN)
    for word in words:
        assert word in down.link.reason
    status = await anonymous.status()
    assert (status.link, status.link_reason) == (DOWN, down.link.reason)
    assert not act or anonymous.vmm.waits(act)
    assert anonymous.vmm.frames == []
    await check_everything(anonymous, {})
    assert not act or await anonymous.vmm.touched(act) == expected(1)


WORDS = pytest.mark.parametrize(
    "text", [pytest.param("the memory of web-1 cannot be read: ✗ EIO", id="text"), pytest.param("", id="no text")]
)


@WORDS
async def test_the_words_of_a_source_that_cannot_push_are_passed_on(anonymous: Destination, text: str) -> None:
    """The link stays, and demand with it. The push is tried again."""
    await anonymous.attach()
    await anonymous.connect()
    anonymous.source.instead_of_push = [failed(text).encode()] * 8
    await anonymous.push(1)
    assert text in (await anonymous.event("failed")).failed.reason
    assert await anonymous.vmm.touch(1) == expected(1)
    assert (await anonymous.status()).link == UP
    anonymous.source.instead_of_push = []
    await anonymous.event("all_present")


@WORDS
async def test_the_reason_of_a_failing_source_is_passed_on(anonymous: Destination, text: str) -> None:
    await anonymous.attach()
    await anonymous.connect()
    await mislead(anonymous, "urgent", failed(text).encode())
    down = await anonymous.link_event(DOWN)
    assert down.link.reason
    assert text in down.link.reason
    assert (await anonymous.status()).link_reason == down.link.reason
    await check_everything(anonymous, {})


async def test_words_that_are_no_text_harm_nothing(anonymous: Destination) -> None:
    await anonymous.attach()
    await anonymous.connect()
    act = await mislead(anonymous, "urgent", Frame(Kind.FAILED, count=4, body=b"no\xff\xfe").encode())
    assert "no" in (await anonymous.link_event(DOWN)).link.reason
    await anonymous.connect()
    assert await anonymous.vmm.touched(act) == expected(1)


@pytest.mark.parametrize("then", ["data", "poison", "given back"])
@LANES
async def test_half_a_page_is_never_seen(destination: Destination, lane: str, then: str) -> None:
    """The lane breaks in the middle of page 1; it is asked for again, or is no more."""
    source, vmm = destination.source, destination.vmm
    await destination.attach()
    await destination.connect()
    half = Frame(Kind.DATA, 0, 1, 1, body=GARBAGE[: PAGE // 2])
    if lane == "bulk":  # nobody waits for one page alone
        half = Frame(Kind.DATA, 0, 0, 3, body=bytes([1]) * PAGE + half.body)
    act = await mislead(destination, lane, half.encode())
    faults = (await destination.status()).progress.faults
    await source.cut()
    down = await destination.link_event(DOWN)
    assert down.link.reason
    late, other = (await vmm.start_touch(1))[0], (await vmm.start_touch(2))[0]
    await destination.status_until(lambda status: status.progress.faults == faults + 2)
    assert vmm.waits(late)
    assert vmm.waits(other)
    assert not act or vmm.waits(act)
    result = expected(1)
    if then == "poison":
        source.poison, result = {1: READ}, "sigbus"
    elif then == "given back":
        await vmm.give_back(1)
        result = "byte:0"
    await check_everything(destination, {1: result})
    assert await vmm.touched(late) == result
    assert await vmm.touched(other) == expected(2)
    assert not act or await vmm.touched(act) == result
    if lane == "urgent" and then == "data":
        assert source.asked.count(1) == 2, "asked again"


@pytest.mark.parametrize("sent", [1, Frame.FORM.size - 1, Frame.FORM.size, Frame.FORM.size + 1])
async def test_a_frame_that_breaks_off_is_asked_for_again(anonymous: Destination, sent: int) -> None:
    await anonymous.attach()
    await anonymous.connect()
    act = await mislead(anonymous, "urgent", Frame(Kind.DATA, 0, 1, 1, body=GARBAGE).encode()[:sent])
    await anonymous.source.cut()
    await anonymous.link_event(DOWN)
    assert anonymous.vmm.waits(act)
    await anonymous.connect()
    assert await anonymous.vmm.touched(act) == expected(1)


async def test_a_lost_bulk_lane_is_opened_anew(destination: Destination) -> None:
    """As long as the urgent lane stands the link is up; of the half page nothing is seen."""
    half = Frame(Kind.DATA, 0, 1, 1, body=GARBAGE[: PAGE // 2]).encode()
    await destination.attach()
    await destination.connect()
    await mislead(destination, "bulk", half)
    await destination.source.cut({"bulk"})
    events = await destination.events_until(lambda event: event.WhichOneof("event") == "all_present")
    assert DOWN not in [event.link.state for event in events]
    assert [await destination.vmm.touch(page) for page in range(PAGES)] == [expected(page) for page in range(PAGES)]


async def test_a_lane_to_nowhere_is_unavailable(anonymous: Destination) -> None:
    """The address is that of OpenLaneReply."""
    await anonymous.attach()
    right, anonymous.source.lane_address = anonymous.source.lane_address, "127.0.0.1:1"
    with pytest.raises(grpc.aio.AioRpcError) as nowhere:
        await anonymous.connect()
    assert nowhere.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "127.0.0.1:1" in (nowhere.value.details() or "")
    anonymous.source.lane_address = right
    await anonymous.connect()
    assert (await anonymous.status()).link == UP
    assert await anonymous.vmm.touch(1) == expected(1)
