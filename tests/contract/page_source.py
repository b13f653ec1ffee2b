"""A plain gRPC server of Pages: stands in for the source's pager.

Page n of the whole memory holds byte n % 251 + 1 throughout; every fourth is all zeros; those in `poison` are poison.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import groupby
from typing import Any

import grpc

from vmferry.v1 import common_pb2, pages_pb2
from vmferry.v1.pages_pb2_grpc import PagesServicer, add_PagesServicer_to_server

PAGE = 4096
TOKEN = "one-time"
FIRST_PAGES = (0, 64)
"""Number, in the whole memory, of each region's first page."""
PAGES = 96
PUSH_PAGES = 8


def byte_of(page: int) -> int:
    return 0 if page % 4 == 3 else page % 251 + 1


def expected(page: int) -> str:
    """What a touch of a good page gives."""
    return f"byte:{byte_of(page)}"


class PageSource(PagesServicer):
    """One source. `asked` has each page that was demanded, once a demand. While `may_answer` is clear, no demand is
    answered; while `may_push` is clear, no more is pushed."""

    def __init__(self) -> None:
        self.poison: dict[int, pages_pb2.Poison] = {}
        self.asked: list[int] = []
        self.pushes = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.may_push = asyncio.Event()
        self.may_push.set()
        self.address = ""
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """At a new port, so that nothing is left of the connections before."""
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_PagesServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """All its connections break."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Demand(  # noqa: N802
        self, requests: AsyncIterator[pages_pb2.PageRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pages_pb2.PageReply]:
        await self._admit(context)
        async for request in requests:
            assert request.protocol_version == 1
            self.asked += pages_of(request.range)
            await self.may_answer.wait()
            yield pages_pb2.PageReply(runs=self._runs(request.range))

    async def Push(  # noqa: N802
        self, request: pages_pb2.PushRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pages_pb2.PageReply]:
        await self._admit(context)
        assert request.protocol_version == 1
        self.pushes += 1
        for lacking in request.lacking:
            for page in range(lacking.page, lacking.page + lacking.count, PUSH_PAGES):
                count = min(PUSH_PAGES, lacking.page + lacking.count - page)
                await self.may_push.wait()
                part = common_pb2.PageRange(region=lacking.region, page=page, count=count)
                yield pages_pb2.PageReply(runs=self._runs(part))

    async def _admit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get("vmferry-lane-token") != TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this is not the lane's token")

    def _runs(self, wanted: common_pb2.PageRange) -> Iterator[pages_pb2.Run]:
        """Runs as long as they can be; each poisoned page is a run of its own."""
        first = FIRST_PAGES[wanted.region]
        for kind, group in groupby(pages_of(wanted), self._kind):
            pages = list(group)
            run = pages_pb2.Run(region=wanted.region, page=pages[0] - first, count=len(pages))
            if kind == "data":
                run.data = b"".join(bytes([byte_of(page)]) * PAGE for page in pages)
            elif kind == "zero":
                run.zero.SetInParent()
            else:
                run.poison.CopyFrom(self.poison[pages[0]])
            yield run

    def _kind(self, page: int) -> str:
        if page in self.poison:
            return f"poison {page}"
        return "data" if byte_of(page) else "zero"


def pages_of(run: common_pb2.PageRange) -> range:
    """The run's pages by their numbers in the whole memory."""
    first = FIRST_PAGES[run.region] + run.page
    return range(first, first + run.count)
