"""A destination's pager between a plain gRPC client, a plain source of pages and a VMM in a child process."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from tests.support.contract.page_source import FIRST_PAGES, PAGES, TOKEN, PageSource
from tests.support.contract.vmm_child import PAGE, PATIENCE_S, Json, Vmm, feature_bits
from vmferry.demo.patience import patient
from vmferry.v1 import common_pb2, pager_pb2
from vmferry.v1.pager_pb2_grpc import PagerStub

if TYPE_CHECKING:  # names of the stubs' types only: the generated code has no such classes
    from vmferry.v1.pager_pb2_grpc import PagerAsyncStub

VM = "web-1"
GPAS = (0, 0x100000)
"""Of the two regions, which lie side by side in the VMM but not in the guest."""
COUNTS = (FIRST_PAGES[1], PAGES - FIRST_PAGES[1])
HUGE_PAGE = 2 << 20
PIECES = HUGE_PAGE // PAGE
HUGE_PAGES = 4
"""Of the one region on huge pages. Its pages are numbered by their pieces of 4 KiB."""
DEMAND_TIMEOUT_S = patient(20.0)
CONTROL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),  # a unix path is no authority that HTTP/2 servers take
    ("grpc.initial_reconnect_backoff_ms", 50),  # the pager is just starting
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)


def gpa_of(page: int) -> int:
    """Of a page by its number in the whole memory."""
    region = int(page >= FIRST_PAGES[1])
    return GPAS[region] + (page - FIRST_PAGES[region]) * PAGE


@dataclass(frozen=True, slots=True)
class Region:
    """`first` and `count` are in pages of 4 KiB."""

    gpa: int
    first: int
    count: int
    page_size: int


def is_huge(backing: str) -> bool:
    return "hugetlb" in backing


def is_file(backing: str) -> bool:
    return backing in {"memfd", "hugetlb"}


def regions_of(backing: str) -> list[Region]:
    if is_huge(backing):
        return [Region(0, 0, HUGE_PAGES * PIECES, HUGE_PAGE)]
    return [Region(*each, PAGE) for each in zip(GPAS, FIRST_PAGES, COUNTS, strict=True)]


def layout(backing: str) -> common_pb2.MemoryLayout:
    number = common_pb2.BACKING_MEMFD if is_file(backing) else common_pb2.BACKING_ANONYMOUS
    regions = [
        common_pb2.MemoryRegion(gpa=each.gpa, size=each.count * PAGE, page_size=each.page_size, backing=number)
        for each in regions_of(backing)
    ]
    return common_pb2.MemoryLayout(regions=regions)


@dataclass
class Destination:
    """`control` is the daemon's end. Pages are numbered over both regions, as in `page_source`. `backing` is
    "anonymous" or "memfd", or the same of huge pages: "anonymous hugetlb" or "hugetlb"."""

    directory: Path
    backing: str
    pager: subprocess.Popen[bytes]
    control: PagerAsyncStub
    vmm: Vmm
    source: PageSource
    ahead: bool = False
    """Whether memory for all pages is allocated once it is attached: the push is received in place then."""
    uffds: int = 1
    """With 2 the second region has one of its own."""

    def message(self) -> Json:
        """The correct memory message; its descriptors are `self.descriptors`."""
        regions: list[Json] = []
        for each in regions_of(self.backing):
            hva = self.vmm.hva + each.first * PAGE
            region: Json = {"gpa": each.gpa, "base_host_virt_addr": hva, "size": each.count * PAGE}
            region |= {"page_size": each.page_size, "backing": "anonymous"}
            if is_file(self.backing):
                region |= {"backing": "memfd", "fd": 1, "offset": each.first * PAGE}
            regions.append(region)
        if self.uffds == 2:
            regions[1]["uffd"] = self.descriptors.index("v")
        pid = self.vmm.process.pid
        return {"version": 1, "vm": VM, "role": "destination", "pid": pid, "uffd": 0, "regions": regions}

    @property
    def descriptors(self) -> str:
        return ("um" if is_file(self.backing) else "u") + ("v" if self.uffds == 2 else "")

    async def attach(self, by_process: bool = False) -> None:
        """`by_process`: as an adopted VMM, which takes its machine checks from the kernel and says nothing itself."""
        process = {"process": len(self.descriptors)} if by_process else {}
        answer = await self.vmm.answer(self.message() | process, self.descriptors + ("p" if by_process else ""))
        assert answer == {"type": "attached", "version": 1}
        if self.ahead:
            await self.preallocate()

    async def preallocate(self) -> None:
        held = [common_pb2.PageRange(region=n, page=0, count=count) for n, count in enumerate(COUNTS)]
        reply = await self.control.Preallocate(pager_pb2.PreallocateRequest(held=held), timeout=PATIENCE_S)
        assert reply.bytes == PAGES * PAGE

    async def connect(
        self, token: str = TOKEN, demand_timeout_s: float = DEMAND_TIMEOUT_S, connect_timeout_s: float = PATIENCE_S
    ) -> None:
        request = pager_pb2.ConnectLanesRequest(
            lane_address=self.source.address,
            token=token,
            demand_timeout_s=demand_timeout_s,
            connect_timeout_s=connect_timeout_s,
        )
        await self.control.ConnectLanes(request, timeout=PATIENCE_S)

    async def push(self, lanes: int = 0) -> None:
        await self.control.StartPush(pager_pb2.StartPushRequest(lanes=lanes), timeout=PATIENCE_S)

    async def complete(self) -> int:
        return (await self.control.Complete(pager_pb2.CompleteRequest(), timeout=PATIENCE_S)).guarded_pages

    async def mark(self, page: int, guest_visible: bool = False) -> tuple[int, int, int]:
        """The daemon knows of an error: how many pages are newly poison, were already, are healed."""
        origin = common_pb2.ERROR_ORIGIN_OPERATOR
        error = common_pb2.MemoryError(gpa=gpa_of(page), lsb=12, origin=origin, guest_visible=guest_visible, count=1)
        request = pager_pb2.MarkPoisonedRequest(errors=[error])
        reply = await self.control.MarkPoisoned(request, timeout=PATIENCE_S)
        return reply.marked, reply.already, reply.healed

    async def forget_replaced(self) -> int:
        """The daemon says that the guest was reset; the number of pages that the VMM had replaced."""
        reply = await self.control.ForgetReplaced(pager_pb2.ForgetReplacedRequest(), timeout=PATIENCE_S)
        return reply.replaced

    async def status(self) -> pager_pb2.PagerStatus:
        return await self.control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S)

    async def status_until(self, wanted: Callable[[pager_pb2.PagerStatus], bool]) -> pager_pb2.PagerStatus:
        """Asks until the pager stands so."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await self.status()
                if wanted(status):
                    return status

    async def events_until(
        self, wanted: Callable[[pager_pb2.PagerEvent], bool], after: int = 0
    ) -> list[pager_pb2.PagerEvent]:
        """The events after a number, up to and with the first that is wanted."""
        events: list[pager_pb2.PagerEvent] = []
        call = self.control.WatchEvents(pager_pb2.WatchEventsRequest(after=after), timeout=PATIENCE_S)
        async for event in call:
            events.append(event)
            if wanted(event):
                call.cancel()
                return events
        raise AssertionError(f"the stream ended after {events}")

    async def event(self, kind: str, after: int = 0) -> pager_pb2.PagerEvent:
        return (await self.events_until(lambda event: event.WhichOneof("event") == kind, after))[-1]

    async def link_event(self, state: int, after: int = 0) -> pager_pb2.PagerEvent:
        return (await self.events_until(lambda event: event.link.state == state, after))[-1]

    @property
    def pages(self) -> int:
        """Number of pages of 4 KiB."""
        return sum(each.count for each in regions_of(self.backing))

    async def everything(self) -> None:
        """Attaches, connects, pushes; returns when no page is absent."""
        await self.attach()
        await self.connect()
        await self.push()
        await self.event("all_present")


def start_pager(program: str, directory: Path) -> subprocess.Popen[bytes]:
    command = [program, "--runtime-dir", str(directory), "--vm", VM, "--role", "destination"]
    with (directory / "pager.log").open("wb") as log:
        return subprocess.Popen(command, stderr=log)


@asynccontextmanager
async def destination_of(
    program: str, child: Path, backing: str, directory: Path, uffds: int = 1
) -> AsyncIterator[Destination]:
    """A pager that expects a VMM, the VMM that has not attached yet, and a source that answers."""
    source, vmm = PageSource(), None
    pager = start_pager(program, directory)
    try:
        await source.start()
        async with grpc.aio.insecure_channel(f"unix:{directory}/pager.sock", options=CONTROL) as channel:
            control: PagerAsyncStub = PagerStub(channel)
            await control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S, wait_for_ready=True)
            expect = pager_pb2.ExpectDestinationRequest(layout=layout(backing))
            features = (await control.ExpectDestination(expect, timeout=PATIENCE_S)).uffd_features
            first = FIRST_PAGES[1] if uffds == 2 else None
            pages = HUGE_PAGES if is_huge(backing) else PAGES
            vmm = await Vmm.start(
                child, backing, pages, feature_bits(features), directory / "memory.sock", first_uffd=first
            )
            yield Destination(directory, backing, pager, control, vmm, source, uffds=uffds)
    finally:
        pager.kill()
        pager.wait(PATIENCE_S)
        if vmm is not None:
            await vmm.end()
        await source.stop()
