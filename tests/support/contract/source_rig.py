"""A source's pager with its VMM, between a plain gRPC client and plain lanes that stand in for the destination."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from tests.support.contract import lanes
from tests.support.contract.lanes import MAGIC, PAGE, PROBE, Ask, Frame, Hello, Kind
from vmferry.demo.patience import patient
from vmferry.v1 import common_pb2, pager_pb2, pages_pb2
from vmferry.v1.pager_pb2_grpc import PagerStub
from vmferry.v1.pages_pb2_grpc import PagesStub

if TYPE_CHECKING:  # names of the stubs' types only: the generated code has no such classes
    from vmferry.v1.pager_pb2_grpc import PagerAsyncStub
    from vmferry.v1.pages_pb2_grpc import PagesAsyncStub

PAGES = 64
HUGE_PAGES = 1024
"""Pages of 4 KiB of a memory of huge pages."""
PAGE_SIZES = {"hugetlb": 2 << 20, "anonymous hugetlb": 2 << 20}
TOKEN = "one-time"
WITH_TOKEN = (("vmferry-lane-token", TOKEN),)
PATIENCE_S = patient(30)
# A unix path is no authority that HTTP/2 servers take.
OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.initial_reconnect_backoff_ms", 50),  # the pager is just starting
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)


class FailedError(Exception):
    """A FAILED came; its text."""


@dataclass
class Source:
    """`control` is the daemon's end, `lane` the address for destinations."""

    control: PagerAsyncStub
    lane: str
    pager: subprocess.Popen[bytes]
    vmm: subprocess.Popen[bytes]
    hva: int
    """Of the memory in the VMM."""
    pages: int = PAGES

    async def freeze(self) -> None:
        await self.control.Freeze(pager_pb2.FreezeRequest(), timeout=PATIENCE_S)

    async def thaw(self) -> None:
        await self.control.Thaw(pager_pb2.ThawRequest(), timeout=PATIENCE_S)

    async def open_lane(
        self, request: pages_pb2.OpenLaneRequest, metadata: Sequence[tuple[str, str]] = WITH_TOKEN
    ) -> pages_pb2.OpenLaneReply:
        """Raises: grpc.aio.AioRpcError: refused."""
        async with grpc.aio.insecure_channel(self.lane, options=OPTIONS) as channel:
            pages: PagesAsyncStub = PagesStub(channel)
            return await pages.OpenLane(request, metadata=metadata, timeout=PATIENCE_S)

    @asynccontextmanager
    async def connection(self, reply: pages_pb2.OpenLaneReply) -> AsyncIterator[Lane]:
        """A connection to where a lane was agreed on; nothing is said on it yet."""
        async with asyncio.timeout(PATIENCE_S):
            host, _, port = (reply.address or self.lane).rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                yield Lane(reader, writer, self.pages)
            finally:
                writer.transport.abort()

    @asynccontextmanager
    async def opened(self, request: pages_pb2.OpenLaneRequest) -> AsyncIterator[Lane]:
        """An open lane."""
        reply = await self.open_lane(request)
        async with self.connection(reply) as lane:
            lane.say(Hello(reply.token).encode())
            yield lane


@dataclass
class Lane:
    """The destination's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    layout_pages: int
    open: bool = False

    def say(self, said: bytes) -> None:
        self.writer.write(said)

    def ask(self, page: int, count: int = 1, region: int = 0) -> None:
        self.say(Ask(region, page, count).encode())

    async def frame(self) -> Frame | None:
        """The next, well-formed; None at the end of the lane.

        Raises: asyncio.IncompleteReadError: the lane ended in a frame.
        """
        try:
            await self._probed()
            head = await self.reader.readexactly(Frame.FORM.size)
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        except ConnectionResetError:
            return None
        frame = Frame.decode(head)
        frame = Frame.decode(head, await self.reader.readexactly(frame.body_bytes))
        check_form(frame, self.layout_pages)
        return frame

    async def _probed(self) -> None:
        """The source's probe, before the first frame."""
        if not self.open:
            assert await self.reader.readexactly(len(MAGIC) + len(PROBE)) == MAGIC + PROBE
            self.open = True

    async def pages(self, count: int) -> dict[int, Frame]:
        """The frames of so many pages, by page; of a bulk lane with `count` 0 all up to its END.

        Raises: FailedError. ConnectionResetError: the lane ended before.
        """
        got: dict[int, Frame] = {}
        while not count or len(got) < count:
            frame = await self.frame()
            if frame is None:
                raise ConnectionResetError(f"the lane ended after pages {sorted(got)}")
            if frame.kind == Kind.FAILED:
                assert await self.frame() is None, "a FAILED is the last"
                raise FailedError(frame.body.decode())
            if frame.kind == Kind.END:
                assert not count, "an urgent lane has no END"
                assert await self.frame() is None, "an END is the last"
                return got
            for page in frame.pages:
                assert page not in got, "each page comes exactly once"
                got[page] = frame
        return got

    async def all_said(self) -> bytes:
        """The frames of the source until it closes."""
        said = bytearray()
        try:
            while part := await self.reader.read(1 << 16):
                said += part
        except ConnectionResetError:
            pass
        return bytes(said)


def check_form(frame: Frame, pages: int) -> None:
    """The source keeps to the contract and to the layout."""
    if frame.kind in {Kind.DATA, Kind.ZERO, Kind.POISON}:
        assert frame.region == 0
        assert frame.count > 0
        assert frame.page + frame.count <= pages
    if frame.kind == Kind.DATA:
        assert frame.count <= lanes.MOST_DATA_PAGES
    if frame.kind == Kind.POISON:
        assert frame.origin in common_pb2.ErrorOrigin.values()
        assert frame.guest_visible in {0, 1}


def urgent(version: int = lanes.VERSION) -> pages_pb2.OpenLaneRequest:
    return pages_pb2.OpenLaneRequest(protocol_version=version, urgent=pages_pb2.UrgentLane())


def bulk(*lacking: tuple[int, int], region: int = 0, version: int = lanes.VERSION) -> pages_pb2.OpenLaneRequest:
    """For ranges: first page, count."""
    ranges = [common_pb2.PageRange(region=region, page=page, count=count) for page, count in lacking]
    return pages_pb2.OpenLaneRequest(protocol_version=version, bulk=pages_pb2.BulkLane(lacking=ranges))


async def demand(source: Source, page: int, count: int = 1) -> dict[int, Frame]:
    """The answer to one ask on a lane of its own, by page.

    Raises: as `Lane.pages`.
    """
    async with source.opened(urgent()) as lane:
        lane.ask(page, count)
        return await lane.pages(max(count, 1))


async def push(source: Source, page: int, count: int = 1) -> dict[int, Frame]:
    """The frames of a bulk lane for one range that is lacking.

    Raises: as `Lane.pages`.
    """
    return await push_all(source, (page, count))


async def push_all(source: Source, *lacking: tuple[int, int]) -> dict[int, Frame]:
    async with source.opened(bulk(*lacking)) as lane:
        return await lane.pages(0)


def check(pages: dict[int, Frame], poisoned: set[int]) -> None:
    """Every page has the stand-in's contents, or is poison."""
    for page, frame in pages.items():
        if page in poisoned:
            assert frame.kind == Kind.POISON, page
        elif page % 4 == 3:
            assert frame.kind == Kind.ZERO, page
        else:
            assert frame.kind == Kind.DATA, page
            assert frame.contents(page) == bytes([page % 251 + 1]) * PAGE, page


def layout(backing: str) -> common_pb2.MemoryLayout:
    number = common_pb2.BACKING_ANONYMOUS if backing.startswith("anonymous") else common_pb2.BACKING_MEMFD
    size, page_size = pages_of(backing) * PAGE, PAGE_SIZES.get(backing, PAGE)
    region = common_pb2.MemoryRegion(gpa=0, size=size, page_size=page_size, backing=number)
    return common_pb2.MemoryLayout(regions=[region])


def pages_of(backing: str) -> int:
    return HUGE_PAGES if backing in PAGE_SIZES else PAGES


def start_pager(program: str, directory: Path) -> subprocess.Popen[bytes]:
    command = [program, "--runtime-dir", str(directory), "--vm", "web-1", "--role", "source"]
    with (directory / "pager.log").open("wb") as log:
        return subprocess.Popen(command, stderr=log)


def start_vmm(backing: str, path: Path) -> subprocess.Popen[bytes]:
    script = str(Path(__file__).with_name("vmm_stand_in.py"))
    command = [sys.executable, script, backing, str(pages_of(backing)), str(path)]
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


@asynccontextmanager
async def source_of(program: str, backing: str, directory: Path) -> AsyncIterator[Source]:
    """A pager with an attached VMM; not frozen yet."""
    pager = start_pager(program, directory)
    vmm = None
    try:
        async with grpc.aio.insecure_channel(f"unix:{directory}/pager.sock", options=OPTIONS) as channel:
            control: PagerAsyncStub = PagerStub(channel)
            lane = await serve(control, backing)
            vmm = start_vmm(backing, directory / "memory.sock")
            assert vmm.stdout is not None
            async with asyncio.timeout(PATIENCE_S):
                answer = json.loads(await asyncio.to_thread(vmm.stdout.readline))
            assert answer["type"] == "attached", answer
            yield Source(control, lane, pager, vmm, answer["hva"], pages_of(backing))
    finally:
        for process in (vmm, pager):
            if process is not None:
                end(process)
