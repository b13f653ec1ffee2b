"""The client of one pager over `pager.sock`: `ports.Pager`.

| gRPC status of the pager | reason |
|---|---|
| UNAVAILABLE, CANCELLED, UNKNOWN, DEADLINE_EXCEEDED | PAGER_FAILED: it died, or does not answer |
| UNAVAILABLE from ConnectLanes, while the pager itself answers | LINK_DOWN: the source's pager cannot be reached |
| FAILED_PRECONDITION from ExpectDestination | KERNEL_LACKS_FEATURE |
| RESOURCE_EXHAUSTED from Preallocate | DESTINATION_NO_MEMORY |
| INVALID_ARGUMENT | INVALID_ARGUMENT |
| anything else | PAGER_FAILED, with the pager's words |
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import grpc

from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import allocation_s, held_bytes, layout_bytes
from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.pager import PagerEvent, PagerStatus
from vmferry.pager import convert
from vmferry.pager.directory import CONTROL_SOCKET, MEMORY_SOCKET
from vmferry.pager.settings import PagerSettings
from vmferry.rpc import convert as wire
from vmferry.units import MIB
from vmferry.v1 import pager_pb2 as pb
from vmferry.v1.pager_pb2_grpc import PagerStub

Answer = TypeVar("Answer")

ERRORS_A_CALL = 10_000
"""The most errors in one MarkPoisoned, well below gRPC's 4 MiB per message."""


def _options(connect_s: float) -> tuple[tuple[str, int | str], ...]:
    return (
        ("grpc.max_receive_message_length", 16 * MIB),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # The deadline of one attempt to connect, whatever gRPC calls it: a busy pager takes its time.
        ("grpc.min_reconnect_backoff_ms", int(connect_s * 1_000)),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        # gRPC would name the percent-encoded socket path, which HTTP/2 servers in Rust refuse (RST_STREAM 1).
        ("grpc.default_authority", "localhost"),
    )


class GrpcPager:
    """The client of a pager process, which `process.py` has found."""

    def __init__(self, directory: Path, vm: str, settings: PagerSettings) -> None:
        self._directory = directory
        self._vm = vm
        self._lanes = settings.lanes
        self._deadlines = settings.deadlines
        options = _options(settings.deadlines.call_s)
        self._channel = grpc.aio.insecure_channel(f"unix:{quote(str(directory / CONTROL_SOCKET))}", options=options)
        self._stub = PagerStub(self._channel)
        self._closed = False

    @property
    def memory_socket(self) -> Path:
        return self._directory / MEMORY_SOCKET

    async def status(self) -> PagerStatus:
        return convert.status_from_pb(await self.raw_status(self._deadlines.call_s))

    async def raw_status(self, deadline_s: float) -> pb.PagerStatus:
        """The whole answer of GetStatus."""
        return await self._call("GetStatus", self._stub.GetStatus, pb.GetStatusRequest(), deadline_s)

    async def serve_source(self, layout: MemoryLayout, token: str, push_bytes_per_s: int) -> str:
        request = pb.ServeSourceRequest(
            layout=wire.layout_to_pb(layout),
            listen_ip=self._lanes.listen_ip,
            port_first=self._lanes.ports[0],
            port_last=self._lanes.ports[1],
            token=token,
            push_bytes_per_s=push_bytes_per_s,
        )
        reply = await self._call("ServeSource", self._stub.ServeSource, request, self._deadlines.call_s)
        return reply.lane_address

    async def list_held(self, layout: MemoryLayout) -> Sequence[PageRange]:
        deadline_s = self._deadlines.call_s + allocation_s(layout_bytes(layout))
        reply = await self._call("ListHeld", self._stub.ListHeld, pb.ListHeldRequest(), deadline_s)
        return wire.ranges_from_pb(reply.held)

    async def set_push_limit(self, push_bytes_per_s: int) -> None:
        request = pb.SetPushLimitRequest(push_bytes_per_s=push_bytes_per_s)
        await self._call("SetPushLimit", self._stub.SetPushLimit, request, self._deadlines.call_s)

    async def freeze(self) -> None:
        await self._call("Freeze", self._stub.Freeze, pb.FreezeRequest(), self._deadlines.call_s)

    async def thaw(self) -> None:
        await self._call("Thaw", self._stub.Thaw, pb.ThawRequest(), self._deadlines.call_s)

    async def expect_destination(self, layout: MemoryLayout) -> Sequence[str]:
        request = pb.ExpectDestinationRequest(layout=wire.layout_to_pb(layout))
        reply = await self._call("ExpectDestination", self._stub.ExpectDestination, request, self._deadlines.call_s)
        return tuple(reply.uffd_features)

    async def preallocate(self, held: Sequence[PageRange]) -> int:
        size = held_bytes(held)
        request = pb.PreallocateRequest(held=wire.ranges_to_pb(held))
        deadline_s = self._deadlines.call_s + allocation_s(size)
        try:
            reply = await self._call("Preallocate", self._stub.Preallocate, request, deadline_s)
        except VmferryError as error:
            rpc = error.__cause__
            if isinstance(rpc, grpc.aio.AioRpcError) and rpc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise VmferryError(
                    Reason.DESTINATION_NO_MEMORY,
                    f"The destination lacks memory for the {size / MIB:.0f} MiB that {self._vm} holds: "
                    f"{rpc.details()}.",
                    "Free memory there (also of the VMM's memory cgroup), or take another destination.",
                ) from error
            raise
        return reply.bytes

    async def connect_lanes(self, lane_address: str, token: str) -> None:
        request = pb.ConnectLanesRequest(
            lane_address=lane_address,
            token=token,
            demand_timeout_s=self._lanes.demand_timeout_s,
            connect_timeout_s=self._deadlines.connect_s,
        )
        deadline_s = self._deadlines.connect_s + self._deadlines.call_s
        try:
            await self._call("ConnectLanes", self._stub.ConnectLanes, request, deadline_s)
        except VmferryError as error:
            rpc = error.__cause__
            refused = isinstance(rpc, grpc.aio.AioRpcError) and rpc.code() is grpc.StatusCode.UNAVAILABLE
            if refused and await self._answers():
                cause = rpc.details() if isinstance(rpc, grpc.aio.AioRpcError) else ""
                raise VmferryError(
                    Reason.LINK_DOWN,
                    f"The pager of {self._vm} cannot reach the source's pager at {lane_address}: {cause}.",
                    "Check the network and the firewall between the hosts for the [pages] ports.",
                ) from error
            raise

    async def start_push(self) -> None:
        request = pb.StartPushRequest(lanes=self._lanes.push_lanes)
        await self._call("StartPush", self._stub.StartPush, request, self._deadlines.call_s)

    async def complete(self) -> int:
        reply = await self._call("Complete", self._stub.Complete, pb.CompleteRequest(), self._deadlines.complete_s)
        return reply.guarded_pages

    async def mark_poisoned(self, errors: Sequence[LedgerEntry]) -> None:
        messages = [wire.error_to_pb(entry) for entry in errors]
        for start in range(0, len(messages), ERRORS_A_CALL):
            request = pb.MarkPoisonedRequest(errors=messages[start : start + ERRORS_A_CALL])
            await self._call("MarkPoisoned", self._stub.MarkPoisoned, request, self._deadlines.call_s)

    async def forget_replaced(self) -> int:
        request = pb.ForgetReplacedRequest()
        reply = await self._call("ForgetReplaced", self._stub.ForgetReplaced, request, self._deadlines.call_s)
        return reply.replaced

    async def events(self, after: int) -> AsyncIterator[PagerEvent]:
        """Yields events until the caller stops or the pager ends. A pager that did not end on purpose raises
        VmferryError.
        """
        call = None
        try:
            call = self._stub.WatchEvents(pb.WatchEventsRequest(after=after))
            async for message in call:
                event = convert.event_from_pb(message)
                if event is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise self._failed("WatchEvents", error) from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            if not self._was_closed():
                raise
            raise self._removed("WatchEvents") from error
        finally:
            if call is not None:
                call.cancel()

    async def acknowledge(self, up_to: int) -> None:
        request = pb.AcknowledgeEventsRequest(up_to=up_to)
        await self._call("AcknowledgeEvents", self._stub.AcknowledgeEvents, request, self._deadlines.call_s)

    async def shutdown(self, even_if_guest_dies: bool) -> None:
        request = pb.ShutdownRequest(even_if_guest_dies=even_if_guest_dies)
        await self._call("Shutdown", self._stub.Shutdown, request, self._deadlines.call_s)

    async def close(self) -> None:
        """Closes this end of the connection. The pager keeps running."""
        self._closed = True
        await self._channel.close(None)

    async def _answers(self) -> bool:
        try:
            await self.raw_status(self._deadlines.call_s)
        except VmferryError:
            return False
        return True

    async def _call(
        self, name: str, method: Callable[..., grpc.aio.UnaryUnaryCall[Any, Answer]], request: object, deadline_s: float
    ) -> Answer:
        try:
            return await method(request, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            raise self._failed(name, error) from error
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            if not self._was_closed():
                raise
            raise self._removed(name) from error

    def _was_closed(self) -> bool:
        """Whether the channel of this call was closed.

        gRPC cancels the calls of a closed channel. For the caller that is the end of the pager, not of its own task. A
        real cancellation stays one.
        """
        task = asyncio.current_task()
        return self._closed and not (task is not None and task.cancelling())

    def _removed(self, name: str) -> VmferryError:
        return VmferryError(Reason.PAGER_FAILED, f"{name} to the pager of {self._vm}: it was removed.")

    def _failed(self, name: str, error: grpc.aio.AioRpcError) -> VmferryError:
        """Maps a status by the table of the module's docstring."""
        code, words = error.code(), error.details() or "no details"
        reason, remedy = Reason.PAGER_FAILED, f"See {self._directory}/pager.log."
        if code is grpc.StatusCode.FAILED_PRECONDITION and name == "ExpectDestination":
            reason, remedy = Reason.KERNEL_LACKS_FEATURE, "Run a kernel with it (UFFDIO_POISON: Linux 6.6 or later)."
        elif code is grpc.StatusCode.INVALID_ARGUMENT:
            reason = Reason.INVALID_ARGUMENT
        return VmferryError(reason, f"{name} to the pager of {self._vm}: {code.name}: {words}.", remedy)
