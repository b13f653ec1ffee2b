"""Stands in for the source's pager: a plain gRPC server of Pages, and a plain TCP server of lanes at another address.

Page n of the whole memory holds byte n % 251 + 1 throughout; every fourth is all zeros; those in `poison` are poison.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import grpc

from tests.support.contract import lanes
from tests.support.contract.lanes import PAGE, Ask, Frame, Hello, Kind
from vmferry.v1 import pages_pb2
from vmferry.v1.pages_pb2_grpc import PagesServicer, add_PagesServicer_to_server

TOKEN = "one-time"
FIRST_PAGES = (0, 64)
"""Number, in the whole memory, of each region's first page."""
PAGES = 96
PUSH_PAGES = 8


@dataclass(frozen=True, slots=True)
class Poison:
    """A source's knowledge of a bad page; `origin` is an ErrorOrigin."""

    origin: int
    guest_visible: bool = False
    hop: int = 0


def byte_of(page: int) -> int:
    return 0 if page % 4 == 3 else page % 251 + 1


def expected(page: int) -> str:
    """The result of touching a good page."""
    return f"byte:{byte_of(page)}"


class PageSource(PagesServicer):
    """One source, which is frozen. With `probes` False it answers a lane's probe by its small packet alone. The
    first `deaf_lanes` urgent lanes answer nothing. An answer comes `answer_after_s` late. `refuses_bulk`: no bulk
    lane opens. `asked` has each page that was demanded, once a demand. While `may_answer` is clear, no demand is
    answered; `together` answers to demands are sent in one, in pieces of `piece_bytes`. While `may_push` is clear,
    no more is pushed; `pushing` is set once a bulk lane is open. `instead_of_answer`, `instead_of_push` and
    `greetings` have what is said instead of an answer, of the next pages of a push, and at once on an urgent lane:
    each once. A lane that has said such a thing sets `misled` and says no more."""

    def __init__(self) -> None:
        self.probes = True
        self.poison: dict[int, Poison] = {}
        self.zeros_as_data = False
        self.deaf_lanes = 0
        self.answer_after_s = 0.0
        self.refuses_bulk = False
        self.push_pages = PUSH_PAGES
        self.asked: list[int] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.together = 1
        self.piece_bytes = 0
        self.may_push = asyncio.Event()
        self.may_push.set()
        self.pushing = asyncio.Event()
        self.instead_of_answer: list[bytes] = []
        self.instead_of_push: list[bytes] = []
        self.greetings: list[bytes] = []
        self.misled = asyncio.Event()
        self.address = ""
        self.lane_address = ""
        self._agreed: dict[bytes, pages_pb2.OpenLaneRequest] = {}
        self._server: grpc.aio.Server | None = None
        self._listener: asyncio.Server | None = None
        self._lanes: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """At new ports, so that nothing is left of the connections before."""
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.lane_address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_PagesServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"

    async def stop(self) -> None:
        """All its connections break.

        Raises: the error that ended a lane, unless the pager hung up.
        """
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self.cut()
        self._agreed.clear()

    async def cut(self, names: Container[str] = ("new", "urgent", "bulk")) -> None:
        """The lanes so named break, wherever they are in a frame; new ones can be opened.

        Raises: as `stop`.
        """
        chosen = {lane for lane in self._lanes if lane.get_name() in names}
        self._lanes -= chosen
        for lane in chosen:
            lane.cancel()
        for ended in await asyncio.gather(*chosen, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def OpenLane(  # noqa: N802
        self, request: pages_pb2.OpenLaneRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pages_pb2.OpenLaneReply:
        metadata = dict(context.invocation_metadata() or ())
        if metadata.get("vmferry-lane-token") != TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this is not the lane's token")
        assert request.protocol_version == lanes.VERSION
        assert request.WhichOneof("lane")
        if self.refuses_bulk and request.WhichOneof("lane") == "bulk":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the source has no room")
        token = secrets.token_bytes(lanes.TOKEN_BYTES)
        self._agreed[token] = request
        return pages_pb2.OpenLaneReply(address=self.lane_address, token=token)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lanes.add(asyncio.create_task(self._serve(reader, writer), name="new"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):  # the pager has closed the lane
                hello = Hello.decode(await reader.readexactly(Hello.FORM.size))
                assert hello.magic == lanes.MAGIC
                if self._listener is None:
                    return  # agreed on before the stop, connected in it
                agreed = self._agreed.pop(hello.token)
                await reader.readexactly(len(lanes.PROBE))
                writer.write(lanes.MAGIC + (lanes.PROBE if self.probes else b""))
                await self._run(agreed, reader, writer)
        finally:
            writer.transport.abort()

    async def _run(
        self, agreed: pages_pb2.OpenLaneRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A lane from its hello on; its task bears its name."""
        task, name = asyncio.current_task(), agreed.WhichOneof("lane")
        assert task is not None
        assert name is not None
        task.set_name(name)
        if name == "urgent":
            await self._answer(reader, writer)
        else:
            await self._push(agreed.bulk, reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.greetings:
            await self._mislead(self.greetings.pop(0), reader, writer)
        if self.deaf_lanes:
            self.deaf_lanes -= 1
            await reader.read()
        ready: list[bytes] = []
        while True:
            ask = Ask.decode(await reader.readexactly(Ask.FORM.size))
            self.asked += numbers(ask)
            await self.may_answer.wait()
            await asyncio.sleep(self.answer_after_s)
            if self.instead_of_answer:
                await self._mislead(self.instead_of_answer.pop(0), reader, writer)
            ready += [frame.encode() for frame in self._frames(ask)]
            if len(ready) < self.together:
                continue
            said, ready = b"".join(ready), []
            step = self.piece_bytes or len(said)
            for at in range(0, len(said), step):
                writer.write(said[at : at + step])
                await writer.drain()
                await asyncio.sleep(0.001 if self.piece_bytes else 0)  # else the kernel may join them

    async def _push(self, bulk: pages_pb2.BulkLane, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pushing.set()
        for lacking in bulk.lacking:
            for page in range(lacking.page, lacking.page + lacking.count, self.push_pages):
                await self.may_push.wait()
                if self.instead_of_push:
                    await self._mislead(self.instead_of_push.pop(0), reader, writer)
                part = Ask(lacking.region, page, min(self.push_pages, lacking.page + lacking.count - page))
                writer.writelines(frame.encode() for frame in self._frames(part))
                await writer.drain()
        writer.write(Frame(Kind.END).encode())
        writer.close()
        await writer.wait_closed()

    async def _mislead(self, said: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Ends with the lane, never by returning.

        Raises: asyncio.IncompleteReadError: the pager has closed it.
        """
        writer.write(said)
        self.misled.set()
        await writer.drain()
        while True:
            await reader.readexactly(Ask.FORM.size)

    def _frames(self, wanted: Ask) -> Iterator[Frame]:
        """As long as they can be; each poisoned page has one of its own."""
        first = FIRST_PAGES[wanted.region]
        for kind, group in groupby(numbers(wanted), self._kind):
            pages = list(group)
            at = (wanted.region, pages[0] - first)
            if kind == "data":
                yield from lanes.data(*at, b"".join(bytes([byte_of(page)]) * PAGE for page in pages))
            elif kind == "zero":
                yield Frame(Kind.ZERO, *at, len(pages))
            else:
                known = self.poison[pages[0]]
                yield Frame(Kind.POISON, *at, 1, known.origin, int(known.guest_visible), known.hop)

    def _kind(self, page: int) -> str:
        if page in self.poison:
            return f"poison {page}"
        return "data" if byte_of(page) or self.zeros_as_data else "zero"


def numbers(wanted: Ask) -> range:
    """The pages by their numbers in the whole memory."""
    first = FIRST_PAGES[wanted.region] + wanted.page
    return range(first, first + wanted.count)
