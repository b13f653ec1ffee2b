"""Any bytes on a lane: either pager lives on, says why the lane is over, and serves the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.contract.destination_rig import Destination, destination_of
from tests.support.contract.lanes import MAGIC, MOST_DATA_PAGES, PAGE, TOKEN_BYTES, Ask, Frame, Hello, Kind
from tests.support.contract.page_source import PAGES, PUSH_PAGES
from tests.support.contract.source_rig import Source, check, demand, source_of, urgent
from tests.support.contract.vmm_child import PATIENCE_S, compile_child
from vmferry.v1 import pager_pb2

if TYPE_CHECKING:
    from tests.support.programs import Programs

UP, DOWN = pager_pb2.LINK_STATE_UP, pager_pb2.LINK_STATE_DOWN
LAST_ASK = b"\xff" * 2 * Ask.FORM.size
"""Wherever the last ask began, one of these bytes is an ask outside every layout."""

counts = st.sampled_from([0, 1, 2, PUSH_PAGES, MOST_DATA_PAGES, MOST_DATA_PAGES + 1, 2**31, 2**32 - 1])
near_pages = st.integers(0, MOST_DATA_PAGES + 1) | st.sampled_from([2**32, 2**63, 2**64 - 1])
near_regions = st.sampled_from([0, 0, 0, 2, 2**32 - 1])
near_bodies = st.binary(max_size=64) | st.integers(0, 3 * PAGE).map(lambda length: b"\xee" * length)
near_frames = st.builds(
    Frame,
    kind=st.integers(0, 6) | st.just(255),
    region=near_regions,
    page=near_pages,
    count=counts,
    origin=st.integers(0, 255),
    guest_visible=st.integers(0, 2),
    hop=st.integers(0, 2**32 - 1),
    body=near_bodies,
).map(Frame.encode)
from_source = st.binary(max_size=256) | st.lists(near_frames, min_size=1, max_size=3).map(b"".join)

near_asks = st.builds(Ask, region=near_regions, page=near_pages, count=counts).map(Ask.encode)
asks = st.lists(near_asks | st.binary(max_size=40), max_size=4).map(b"".join)
hellos = (
    st.binary(max_size=Hello.FORM.size)
    | st.binary(min_size=Hello.FORM.size, max_size=2 * Hello.FORM.size)
    | st.binary(max_size=Hello.FORM.size).map(lambda rest: MAGIC + rest)
    | st.binary(min_size=TOKEN_BYTES, max_size=TOKEN_BYTES).map(lambda token: Hello(token).encode() + LAST_ASK)
)


async def for_any(said: st.SearchStrategy[bytes], examples: int, play: Callable[[bytes], Awaitable[None]]) -> None:
    """Plays each example in this loop, from a thread: one pager hears them all."""
    loop = asyncio.get_running_loop()

    async def within(one: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await play(one)

    @settings(max_examples=examples, deadline=None, database=None)
    @given(said)
    def any_bytes(one: bytes) -> None:
        asyncio.run_coroutine_threadsafe(within(one), loop).result()

    await asyncio.to_thread(any_bytes)


@pytest.fixture(params=["anonymous", "memfd"])
async def destination(
    request: pytest.FixtureRequest, uffd_poison: None, programs: Programs, tmp_path: Path
) -> AsyncIterator[Destination]:
    child = compile_child(tmp_path)
    directory = tmp_path / "vm"
    directory.mkdir()
    async with destination_of(str(programs.pager), child, request.param, directory) as made:
        await made.attach()
        yield made


@pytest.fixture
async def source(programs: Programs, tmp_path: Path) -> AsyncIterator[Source]:
    async with source_of(str(programs.pager), "memfd", tmp_path) as made:
        await made.control.Freeze(pager_pb2.FreezeRequest(), timeout=PATIENCE_S)
        yield made


async def test_a_destination_hears_anything(destination: Destination) -> None:
    """The pager believes well-formed frames, so the test looks at the arrival of pages alone."""
    source = destination.source

    async def play(said: bytes) -> None:
        if (await destination.status()).all_present:
            return
        source.misled.clear()
        source.greetings = [said]
        await destination.connect()
        await source.misled.wait()
        await source.cut()
        status = await destination.status_until(lambda status: status.link != UP)
        assert status.link != DOWN or status.link_reason
        assert destination.pager.poll() is None

    await for_any(from_source, 100, play)
    await destination.connect()
    await destination.push()
    await destination.event("all_present")
    for page in range(PAGES):
        assert await destination.vmm.touch(page)
    assert "ended" not in destination.vmm.said


async def test_a_source_hears_any_hello(source: Source) -> None:
    async def play(said: bytes) -> None:
        reply = await source.open_lane(urgent())
        async with source.connection(reply) as lane:
            lane.say(said)
            if len(said) < Hello.FORM.size:  # it may be going on: left as it is
                await lane.writer.drain()
            else:
                assert await lane.all_said() == b""
        check(await demand(source, 0, 4), set())

    await for_any(hellos, 100, play)


async def test_a_source_hears_any_asks(source: Source) -> None:
    """Its frames are those of the contract, up to a FAILED."""

    async def play(said: bytes) -> None:
        async with source.opened(urgent()) as lane:
            lane.say(said + LAST_ASK)
            with suppress(ConnectionResetError):  # closed before it had read all
                while (frame := await lane.frame()) is not None and frame.kind != Kind.FAILED:
                    assert frame.kind != Kind.END
        check(await demand(source, 0, 4), set())

    await for_any(asks, 100, play)
