"""A plain gRPC client stands in for the daemon and for the destination's pager: what a source's pager answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc
import pytest

from vmferry.v1 import common_pb2, pager_pb2, pages_pb2
from vmferry.v1.pager_pb2_grpc import PagerStub
from vmferry.v1.pages_pb2_grpc import PagesStub

if TYPE_CHECKING:  # names of the stubs' types only: the generated code has no such classes
    from vmferry.v1.pager_pb2_grpc import PagerAsyncStub
    from vmferry.v1.pages_pb2_grpc import PagesAsyncStub

PAGE = 4096
PAGES = 64
POISONED = 5
TOKEN = "one-time"
PATIENCE_S = 30
# A unix path is no authority that HTTP/2 servers take.
OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),  # the pager is just starting
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass
class Source:
    control: PagerAsyncStub
    lane: str

    def pages(self, channel: grpc.aio.Channel) -> PagesAsyncStub:
        return PagesStub(channel)


def layout(backing: str) -> common_pb2.MemoryLayout:
    number = common_pb2.BACKING_MEMFD if backing == "memfd" else common_pb2.BACKING_ANONYMOUS
    return common_pb2.MemoryLayout(
        regions=[common_pb2.MemoryRegion(gpa=0, size=PAGES * PAGE, page_size=PAGE, backing=number)]
    )


def start_pager(program: str, directory: Path) -> subprocess.Popen[bytes]:
    command = [program, "--runtime-dir", str(directory), "--vm", "web-1", "--role", "source"]
    return subprocess.Popen(command, stderr=(directory / "pager.log").open("wb"))


def start_vmm(backing: str, path: Path) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("vmm_stand_in.py"))
    command = [sys.executable, script, backing, str(PAGES), str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(PATIENCE_S)


async def serve(control: PagerAsyncStub, backing: str) -> str:
    await control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S, wait_for_ready=True)
    request = pager_pb2.ServeSourceRequest(
        layout=layout(backing), listen_ip="127.0.0.1", port_first=17700, port_last=17800, token=TOKEN
    )
    return (await control.ServeSource(request, timeout=PATIENCE_S)).lane_address


@pytest.fixture(params=["anonymous", "memfd"])
async def source(request: pytest.FixtureRequest, pager_program: str, tmp_path: Path) -> AsyncIterator[Source]:
    pager = start_pager(pager_program, tmp_path)
    vmm = None
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/pager.sock", options=OPTIONS) as channel:
            control: PagerAsyncStub = PagerStub(channel)
            lane = await serve(control, request.param)
            vmm = start_vmm(request.param, tmp_path / "memory.sock")
            assert vmm.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                answer = json.loads(await asyncio.to_thread(vmm.stdout.readline))
            assert answer["type"] == "attached", answer
            yield Source(control, lane)
    finally:
        for process in (vmm, pager):
            if process is not None:
                end(process)


async def demand(source: Source, page: int, count: int = 1, version: int = 1) -> dict[int, pages_pb2.Run]:
    """The answer to one request on a lane of its own, by page."""
    got: dict[int, pages_pb2.Run] = {}
    wanted = common_pb2.PageRange(region=0, page=page, count=count)
    async with grpc.aio.insecure_channel(source.lane, options=OPTIONS) as channel, asyncio.timeout(PATIENCE_S):
        call = source.pages(channel).Demand(metadata=(("vmferry-lane-token", TOKEN),))
        await call.write(pages_pb2.PageRequest(protocol_version=version, range=wanted))
        while len(got) < count:
            reply = await call.read()  # raises the status, if it is not OK
            assert isinstance(reply, pages_pb2.PageReply), "the lane ended"
            spread(reply, got)
        call.cancel()
    return got


async def push(source: Source, page: int, count: int = 1, version: int = 1) -> dict[int, pages_pb2.Run]:
    """What a bulk lane brings for one range that is lacking."""
    return await push_all(source, [common_pb2.PageRange(region=0, page=page, count=count)], version)


async def push_all(source: Source, lacking: list[common_pb2.PageRange], version: int = 1) -> dict[int, pages_pb2.Run]:
    got: dict[int, pages_pb2.Run] = {}
    async with grpc.aio.insecure_channel(source.lane, options=OPTIONS) as channel, asyncio.timeout(PATIENCE_S):
        request = pages_pb2.PushRequest(protocol_version=version, lacking=lacking)
        async for reply in source.pages(channel).Push(request, metadata=(("vmferry-lane-token", TOKEN),)):
            spread(reply, got)
    return got


LANES = pytest.mark.parametrize("lane", [demand, push])
Lane: TypeAlias = Callable[..., Awaitable[dict[int, pages_pb2.Run]]]


def spread(reply: pages_pb2.PageReply, into: dict[int, pages_pb2.Run]) -> None:
    for run in reply.runs:
        for index in range(run.count):
            assert run.page + index not in into, "each page comes exactly once"
            into[run.page + index] = run


def check(pages: dict[int, pages_pb2.Run], poisoned: set[int]) -> None:
    """Every page is what the stand-in put there, or poison."""
    for page, run in pages.items():
        kind = run.WhichOneof("contents")
        if page in poisoned:
            assert kind == "poison", page
        elif page % 4 == 3:
            assert kind == "zero", page
        else:
            start = (page - run.page) * PAGE
            assert run.data[start : start + PAGE] == bytes([page % 251 + 1]) * PAGE, page


async def status_of(answer: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code()


async def poison(source: Source) -> None:
    error = common_pb2.MemoryError(gpa=POISONED * PAGE, lsb=12, origin=common_pb2.ERROR_ORIGIN_OPERATOR, count=1)
    reply = await source.control.MarkPoisoned(pager_pb2.MarkPoisonedRequest(errors=[error]))
    assert reply.marked == 1


async def test_demand_gives_data_zeros_and_poison(source: Source) -> None:
    await poison(source)
    await source.control.Freeze(pager_pb2.FreezeRequest())
    pages = await demand(source, 0, PAGES)
    assert sorted(pages) == list(range(PAGES))
    check(pages, {POISONED})
    assert pages[POISONED].poison.origin == common_pb2.ERROR_ORIGIN_OPERATOR


async def test_push_gives_what_is_lacking_and_ends(source: Source) -> None:
    await poison(source)
    await source.control.Freeze(pager_pb2.FreezeRequest())
    lacking = [common_pb2.PageRange(region=0, page=2, count=6), common_pb2.PageRange(region=0, page=40, count=24)]
    got = await push_all(source, lacking)
    assert sorted(got) == [*range(2, 8), *range(40, 64)]
    check(got, {POISONED})


@LANES
async def test_nothing_is_served_before_the_vcpus_stand_still(source: Source, lane: Lane) -> None:
    assert await status_of(lane(source, 0)) is grpc.StatusCode.FAILED_PRECONDITION
    await source.control.Freeze(pager_pb2.FreezeRequest())
    check(await lane(source, 0), set())


@LANES
async def test_nothing_is_served_once_they_may_run_again(source: Source, lane: Lane) -> None:
    await source.control.Freeze(pager_pb2.FreezeRequest())
    check(await lane(source, 0), set())
    await source.control.Thaw(pager_pb2.ThawRequest())
    assert await status_of(lane(source, 0)) in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE}


@LANES
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"page": 0, "version": 2}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"page": PAGES}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"page": PAGES - 1, "count": 2}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"page": 2**64 - 1, "count": 2}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_wrong_requests_have_their_status(
    source: Source, lane: Lane, request_: dict[str, int], code: grpc.StatusCode
) -> None:
    await source.control.Freeze(pager_pb2.FreezeRequest())
    assert await status_of(lane(source, **request_)) is code
    check(await lane(source, 0), set())


@pytest.mark.parametrize("metadata", [(), (("vmferry-lane-token", ""),), (("vmferry-lane-token", "wrong"),)])
async def test_a_lane_without_the_token_is_refused(source: Source, metadata: tuple[tuple[str, str], ...]) -> None:
    """The demand lane before it has asked: a request after the refusal would be an error of the client's own."""
    await source.control.Freeze(pager_pb2.FreezeRequest())
    lacking = [common_pb2.PageRange(region=0, page=0, count=1)]
    async with grpc.aio.insecure_channel(source.lane, options=OPTIONS) as channel, asyncio.timeout(PATIENCE_S):
        pages = source.pages(channel)
        assert await pages.Demand(metadata=metadata).code() is grpc.StatusCode.UNAUTHENTICATED
        pushed = pages.Push(pages_pb2.PushRequest(protocol_version=1, lacking=lacking), metadata=metadata)
        assert await pushed.code() is grpc.StatusCode.UNAUTHENTICATED
    check(await demand(source, 0), set())
