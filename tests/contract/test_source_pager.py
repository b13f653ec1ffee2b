"""The answers of a source's pager to a daemon and to the lanes of a destination."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import grpc
import pytest

from tests.support.contract.lanes import MAGIC, PAGE, TOKEN_BYTES, VERSION, Ask, Frame, Hello, Kind
from tests.support.contract.source_rig import (
    PAGES,
    PATIENCE_S,
    FailedError,
    Source,
    bulk,
    check,
    demand,
    push,
    push_all,
    source_of,
    urgent,
)
from vmferry.v1 import common_pb2, pager_pb2, pages_pb2

POISONED = 5


@pytest.fixture(params=["anonymous", "memfd"])
async def source(request: pytest.FixtureRequest, pager_program: str, tmp_path: Path) -> AsyncIterator[Source]:
    async with source_of(pager_program, request.param, tmp_path) as made:
        yield made


@pytest.fixture
async def frozen(pager_program: str, tmp_path: Path) -> AsyncIterator[Source]:
    """On one backing, for tests that do not depend on it."""
    async with source_of(pager_program, "memfd", tmp_path) as made:
        await made.freeze()
        yield made


LANES = pytest.mark.parametrize("lane", [demand, push])
Lane: TypeAlias = Callable[..., Awaitable[dict[int, Frame]]]


async def status_of(answer: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code()


async def failure_of(answer: Awaitable[object]) -> str:
    """The text of the FAILED that comes."""
    with pytest.raises(FailedError) as caught:
        await answer
    return str(caught.value)


async def poison(source: Source, guest_visible: bool = False, hop: int = 0) -> None:
    origin = common_pb2.ERROR_ORIGIN_OPERATOR
    error = common_pb2.MemoryError(
        gpa=POISONED * PAGE, lsb=12, origin=origin, guest_visible=guest_visible, hop=hop, count=1
    )
    reply = await source.control.MarkPoisoned(pager_pb2.MarkPoisonedRequest(errors=[error]))
    assert reply.marked == 1


async def test_demand_gives_data_zeros_and_poison(source: Source) -> None:
    await poison(source)
    await source.freeze()
    pages = await demand(source, 0, PAGES)
    assert sorted(pages) == list(range(PAGES))
    check(pages, {POISONED})


async def test_push_sends_the_missing_pages_and_ends(source: Source) -> None:
    await poison(source)
    await source.freeze()
    got = await push_all(source, (2, 6), (40, 24))
    assert sorted(got) == [*range(2, 8), *range(40, 64)]
    check(got, {POISONED})


@LANES
@pytest.mark.parametrize(("guest_visible", "hop"), [(False, 0), (True, 2**32 - 1)])
async def test_poison_is_told_as_it_is_known(frozen: Source, lane: Lane, guest_visible: bool, hop: int) -> None:
    await poison(frozen, guest_visible, hop)
    told = (await lane(frozen, 0, PAGES))[POISONED]
    assert (told.origin, told.guest_visible, told.hop) == (common_pb2.ERROR_ORIGIN_OPERATOR, int(guest_visible), hop)


async def test_a_push_limit_is_of_bytes_that_are_sent(source: Source) -> None:
    """Zeros and holes are not: at a page a second the limit would take minutes for them."""
    await source.freeze()
    pages = await push_all(source, (0, PAGES))
    zeros = [(page, 1) for page, frame in pages.items() if frame.kind == Kind.ZERO]
    assert zeros
    await source.control.SetPushLimit(pager_pb2.SetPushLimitRequest(push_bytes_per_s=PAGE), timeout=PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(200 // len(zeros) + 1):
            assert sorted(await push_all(source, *zeros)) == [page for page, _ in zeros]


async def test_a_bulk_lane_with_nothing_lacking_ends(frozen: Source) -> None:
    assert await push_all(frozen) == {}


async def test_no_bulk_lane_before_the_vcpus_are_stopped(source: Source) -> None:
    assert await status_of(source.open_lane(bulk((0, 1)))) is grpc.StatusCode.FAILED_PRECONDITION
    await source.freeze()
    check(await push(source, 0), set())


async def test_no_page_is_answered_before_the_vcpus_are_stopped(source: Source) -> None:
    """The urgent lane may be there before, so that it costs no time once they do."""
    async with source.opened(urgent()) as early:
        assert "frozen" in await failure_of(demand(source, 0))
        await source.freeze()
        early.ask(0, 8)
        pages = await early.pages(8)
        assert sorted(pages) == list(range(8))
        check(pages, set())


async def test_no_page_is_served_once_they_may_run_again(source: Source) -> None:
    """By FAILED or by the end of the lane, on lanes from before and on new ones."""
    await source.freeze()
    check(await push(source, 0), set())
    reply = await source.open_lane(bulk((0, PAGES)))
    async with source.opened(urgent()) as lane:
        lane.ask(0)
        check(await lane.pages(1), set())
        await source.thaw()
        with pytest.raises((FailedError, ConnectionError)):
            lane.ask(1)
            await lane.pages(1)
    with pytest.raises((FailedError, OSError)):
        async with source.connection(reply) as late:
            late.say(Hello(reply.token).encode())
            await late.pages(1)
    with pytest.raises((FailedError, OSError, grpc.aio.AioRpcError)):
        await demand(source, 0)
    assert await status_of(push(source, 0)) in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("request_", [urgent(VERSION - 1), urgent(VERSION + 1), bulk((0, 1), version=VERSION + 1)])
async def test_another_version_is_refused(frozen: Source, request_: pages_pb2.OpenLaneRequest) -> None:
    assert await status_of(frozen.open_lane(request_)) is grpc.StatusCode.FAILED_PRECONDITION
    check(await demand(frozen, 0), set())


OUTSIDE = [(PAGES, 1), (PAGES - 1, 2), (2**64 - 1, 2)]


@pytest.mark.parametrize(("page", "count"), OUTSIDE)
async def test_a_bulk_lane_for_pages_outside_the_layout_is_refused(frozen: Source, page: int, count: int) -> None:
    assert await status_of(frozen.open_lane(bulk((0, 1), (page, count)))) is grpc.StatusCode.INVALID_ARGUMENT
    assert await status_of(frozen.open_lane(bulk((0, 1), region=1))) is grpc.StatusCode.INVALID_ARGUMENT
    check(await push(frozen, 0), set())


@pytest.mark.parametrize(("page", "count"), OUTSIDE)
async def test_an_ask_outside_the_layout_fails_and_names_the_range(frozen: Source, page: int, count: int) -> None:
    reason = await failure_of(demand(frozen, page, count))
    assert str(page) in reason
    assert str(count) in reason
    check(await demand(frozen, 0), set())


async def test_an_ask_of_no_such_region_fails(frozen: Source) -> None:
    async with frozen.opened(urgent()) as lane:
        lane.ask(0, 1, region=77)
        assert "77" in await failure_of(lane.pages(1))


async def test_an_ask_of_no_pages_fails(frozen: Source) -> None:
    assert await failure_of(demand(frozen, 9, 0))
    check(await demand(frozen, 9), set())


@pytest.mark.parametrize("metadata", [(), (("vmferry-lane-token", ""),), (("vmferry-lane-token", "wrong"),)])
async def test_a_lane_without_the_token_is_refused(frozen: Source, metadata: tuple[tuple[str, str], ...]) -> None:
    for request in (urgent(), bulk((0, 1))):
        assert await status_of(frozen.open_lane(request, metadata)) is grpc.StatusCode.UNAUTHENTICATED
    check(await demand(frozen, 0), set())


async def test_each_lane_has_a_token_of_its_own_that_is_good_once(frozen: Source) -> None:
    replies = [await frozen.open_lane(urgent()) for _ in range(8)]
    assert {len(reply.token) for reply in replies} == {TOKEN_BYTES}
    assert len({reply.token for reply in replies}) == len(replies)
    hello = Hello(replies[0].token).encode()
    async with frozen.connection(replies[0]) as first, frozen.connection(replies[0]) as second:
        first.say(hello)
        first.ask(0)
        check(await first.pages(1), set())
        second.say(hello + Ask(0, 1, 1).encode())
        assert await second.all_said() == b""
        first.ask(1)
        check(await first.pages(1), set())
    async with frozen.connection(replies[0]) as third:
        third.say(hello)
        assert await third.all_said() == b"", "used, and its lane is over"


@pytest.mark.parametrize(
    ("magic", "token"),
    [
        pytest.param(MAGIC, bytes(TOKEN_BYTES), id="unknown token"),
        pytest.param(b"VMFLANE2", None, id="another version"),
        pytest.param(bytes(8), None, id="zeros"),
        pytest.param(b"GET / HT", None, id="not a lane"),
    ],
)
async def test_a_wrong_hello_is_not_answered(frozen: Source, magic: bytes, token: bytes | None) -> None:
    reply = await frozen.open_lane(urgent())
    async with frozen.connection(reply) as lane:
        lane.say(Hello(token or reply.token, magic).encode())
        assert await lane.all_said() == b""
    check(await demand(frozen, 0), set())


@pytest.mark.parametrize("length", [1, len(MAGIC), Hello.FORM.size - 1])
async def test_a_hello_that_breaks_off_is_not_answered(frozen: Source, length: int) -> None:
    reply = await frozen.open_lane(urgent())
    async with frozen.connection(reply) as lane:
        lane.say(Hello(reply.token).encode()[:length])
        lane.writer.write_eof()
        assert await lane.all_said() == b""
    check(await demand(frozen, 0), set())


async def test_asks_come_in_any_cut(frozen: Source) -> None:
    """One byte at a time, many at once, with the hello: TCP keeps no boundaries."""
    reply = await frozen.open_lane(urgent())
    async with frozen.connection(reply) as lane:
        for byte in Hello(reply.token).encode() + Ask(0, 0, 4).encode():
            lane.say(bytes([byte]))
            await lane.writer.drain()
            await asyncio.sleep(0)
        check(await lane.pages(4), set())
        lane.say(b"".join(Ask(0, page, 4).encode() for page in range(4, PAGES, 4)))
        pages = await lane.pages(PAGES - 4)
        assert sorted(pages) == list(range(4, PAGES))
        check(pages, set())
    reply = await frozen.open_lane(urgent())
    async with frozen.connection(reply) as lane:
        lane.say(Hello(reply.token).encode() + Ask(0, 8, 1).encode() + Ask(0, 8, 1).encode())
        for _ in range(2):  # asked twice, answered twice
            check(await lane.pages(1), set())


async def test_parallel_lanes_do_not_wait_for_each_other(frozen: Source) -> None:
    """One that is silent, one that does not read, one that is only agreed on."""
    silent, agreed = await frozen.open_lane(urgent()), await frozen.open_lane(urgent())
    async with frozen.connection(silent), frozen.opened(urgent()) as deaf:
        for _ in range(256):  # 48 MiB of answers: more than any socket holds
            deaf.ask(0, PAGES)
        await deaf.writer.drain()
        check(await demand(frozen, 0, PAGES), set())
        check(await push(frozen, 0, PAGES), set())
        async with frozen.connection(agreed) as lane:
            lane.say(Hello(agreed.token).encode())
            lane.ask(1)
            check(await lane.pages(1), set())
    status = await frozen.control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S)
    assert status.frozen
    assert status.pages_served > 2 * PAGES
