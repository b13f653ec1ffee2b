"""The source's client of the destination's daemon: `ports.Peers` and `ports.Peer` over gRPC.

The steps of the blackout go over the call `Switchover`, which is open before it. A Start that this call loses is sent
again in a call of its own.

Every call has a deadline. A call that ends without the destination's own answer is DESTINATION_UNREACHABLE: no daemon
listens, it does not answer in time, or the connection broke. The effect is then unknown, and the caller asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import allocation_s, held_bytes
from vmferry.model.facts import HostFacts
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Outcome
from vmferry.model.names import parse_address
from vmferry.peer import convert
from vmferry.peer.contract import PROTOCOL_VERSION, channel_options, transfer_s
from vmferry.rpc import convert as wire
from vmferry.rpc.status import error_of
from vmferry.security.dial import Tunnel
from vmferry.security.identity import Identity
from vmferry.security.refusal import Refusals
from vmferry.v1 import peer_pb2 as pb
from vmferry.v1.peer_pb2_grpc import PeerStub

Answer = TypeVar("Answer")
API_PORT = 7600
"""The default port of a daemon's API: the commonest wrong port of a destination."""

_UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True, slots=True)
class PeerDeadlines:
    """The deadlines of calls, seconds. `prepare` makes memory and `ready` loads a device state, so they have more time.

    The time to carry a large message, and to allocate the held memory, is added. `hello_s` is also the longest silence
    of a destination before the connection counts as broken.
    """

    hello_s: float = 10.0
    prepare_s: float = 60.0
    ready_s: float = 60.0
    start_s: float = 30.0
    refuse_s: float = 30.0
    outcome_s: float = 5.0
    finish_s: float = 30.0


@dataclass(frozen=True, slots=True)
class GrpcPeers:
    """Makes clients. The destination learns `source_host`, this host's name. No identity: plain TCP."""

    source_host: str
    deadlines: PeerDeadlines = field(default_factory=PeerDeadlines)
    identity: Identity | None = None
    refusals: Refusals = field(default_factory=Refusals)

    def connect(self, address: str, job: str) -> GrpcPeer:
        """Returns a client that names this job's nonce in every request.

        It connects with the first call, and again when needed. Call it from the event loop.
        """
        options = channel_options(self.deadlines.hello_s)
        there = parse_address(address)
        tunnel = None
        if self.identity is not None and there is not None:
            tunnel = Tunnel("peer", there, self.identity, self.deadlines.hello_s, self.refusals)
        channel = grpc.aio.insecure_channel(tunnel.target if tunnel else address, options=options)
        return GrpcPeer(address, _Way(channel, tunnel), job, self.source_host, self.deadlines)


@dataclass(frozen=True, slots=True)
class _Way:
    """A channel, and the tunnel that it goes through."""

    channel: grpc.aio.Channel
    tunnel: Tunnel | None


class GrpcPeer:
    """One destination."""

    def __init__(self, address: str, way: _Way, job: str, source_host: str, deadlines: PeerDeadlines) -> None:
        self._address = address
        self._job = job
        self._channel, self._tunnel = way.channel, way.tunnel
        self._stub = PeerStub(way.channel)
        self._source_host = source_host
        self._deadlines = deadlines
        self._switchover: grpc.aio.StreamStreamCall[pb.SwitchoverRequest, pb.SwitchoverReply] | None = None

    async def hello(self, migration: str) -> str:
        request = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, migration=migration, job=self._job)
        reply = await self._call("Hello", self._stub.Hello(request, timeout=self._deadlines.hello_s))
        if reply.protocol_version != PROTOCOL_VERSION:
            raise self._other_version(f"speaks version {reply.protocol_version}")
        if self._tunnel is not None and reply.host != self._tunnel.host:
            of = self._tunnel.host
            raise self._unreachable("Hello", f"it calls itself {reply.host}, and its certificate is of {of}")
        return reply.host

    async def prepare(self, migration: str, wanted: Wanted) -> None:
        request = pb.PrepareRequest(
            migration=migration,
            job=self._job,
            vm=wanted.vm,
            layout=wire.layout_to_pb(wanted.layout),
            vcpus=wanted.vcpus,
            platform=wanted.platform,
            source_host=self._source_host,
            lane_address=wanted.lane_address,
            lane_token=wanted.lane_token,
            ledger=[wire.error_to_pb(entry) for entry in wanted.ledger],
            held=wire.ranges_to_pb(wanted.held),
        )
        deadline_s = self._deadlines.prepare_s + allocation_s(held_bytes(wanted.held)) + transfer_s(request.ByteSize())
        await self._call("Prepare", self._stub.Prepare(request, timeout=deadline_s))
        await self._open_switchover()

    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None:
        request = pb.ReadyRequest(
            migration=migration,
            job=self._job,
            device_state=device_state,
            ledger=[wire.error_to_pb(entry) for entry in ledger],
        )
        if self._switchover is None or self._switchover.done():
            await self._open_switchover()
        deadline_s = self._deadlines.ready_s + transfer_s(request.ByteSize())
        await self._step("Ready", pb.SwitchoverRequest(ready=request), deadline_s)

    async def start(self, migration: str) -> int:
        request = pb.StartRequest(migration=migration, job=self._job)
        if self._switchover is None:
            reply = await self._call("Start", self._stub.Start(request, timeout=self._deadlines.start_s))
            return reply.started_us
        try:
            step = await self._step("Start", pb.SwitchoverRequest(start=request), self._deadlines.start_s)
        finally:
            self._close_switchover()
        return step.start.started_us

    async def refuse(self, migration: str, reason: str) -> None:
        request = pb.RefuseRequest(migration=migration, job=self._job, reason=reason)
        await self._call("Refuse", self._stub.Refuse(request, timeout=self._deadlines.refuse_s))

    async def outcome(self, migration: str) -> tuple[Outcome, str]:
        request = pb.GetOutcomeRequest(migration=migration, job=self._job)
        reply = await self._call("GetOutcome", self._stub.GetOutcome(request, timeout=self._deadlines.outcome_s))
        outcome = convert.outcome_from_pb(reply.outcome)
        if outcome is None:
            raise self._other_version(f"answered the outcome {reply.outcome}, unknown here")
        return outcome, reply.reason

    async def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]:
        """Watches without a deadline. Keepalive pings notice a dead destination within `hello_s`."""
        call = self._stub.WatchIncoming(pb.WatchIncomingRequest(migration=migration, job=self._job))
        try:
            async for message in call:
                update = convert.update_from_pb(message)
                if update is None:
                    raise self._other_version(f"sent the outcome {message.outcome}, unknown here")
                yield update
        except grpc.aio.AioRpcError as error:
            raise self._failed("WatchIncoming", error) from error
        finally:
            call.cancel()

    async def finish(self, migration: str) -> None:
        request = pb.FinishRequest(migration=migration, job=self._job)
        await self._call("Finish", self._stub.Finish(request, timeout=self._deadlines.finish_s))

    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]:
        request = pb.ExchangeFactsRequest(
            migration=migration, job=self._job, facts=convert.facts_to_pb(facts), heard=heard
        )
        call = self._stub.ExchangeFacts(request, timeout=self._deadlines.outcome_s)
        reply = await self._call("ExchangeFacts", call)
        return convert.facts_from_pb(reply.facts), reply.heard

    async def close(self) -> None:
        self._close_switchover()
        await self._channel.close(None)
        if self._tunnel is not None:
            await self._tunnel.close()

    async def _open_switchover(self) -> None:
        self._close_switchover()
        self._switchover = call = self._stub.Switchover(None)
        async with self._answer_within("Switchover", self._deadlines.hello_s):
            await call.initial_metadata()
            if call.done():
                await call.read()  # It raises the error that ended the call.

    def _close_switchover(self) -> None:
        if self._switchover is not None:
            self._switchover.cancel()
        self._switchover = None

    async def _step(self, name: str, request: pb.SwitchoverRequest, deadline_s: float) -> pb.SwitchoverReply:
        """Sends one request of the open call and returns its answer.

        Any error of the transport in the open call means that the connection broke, also INTERNAL, with which a write
        to an ended call fails.
        """
        call = self._switchover
        assert call is not None, "opened by the caller"
        async with self._answer_within(name, deadline_s):
            try:
                if not call.done():
                    await call.write(request)
                reply = await call.read()
            except grpc.aio.AioRpcError as error:
                raise error_of(error) or self._unreachable(name, f"{error.code().name}: {error.details()}") from error
        if isinstance(reply, pb.SwitchoverReply):
            return reply
        raise self._unreachable(name, "the destination ended the call without an answer")

    @asynccontextmanager
    async def _answer_within(self, name: str, deadline_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except TimeoutError as error:
            raise self._unreachable(name, f"DEADLINE_EXCEEDED: no answer within {deadline_s:g} s") from error
        except grpc.aio.AioRpcError as error:
            raise self._failed(name, error) from error

    async def _call(self, name: str, call: grpc.aio.UnaryUnaryCall[Any, Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: grpc.aio.AioRpcError) -> VmferryError:
        """The destination's own reason, or the transport's error."""
        own = error_of(error)
        if own is not None:
            return own
        code, cause = error.code(), error.details() or "no details"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            hint = f" Port {API_PORT} is the API's; peers listen on 7601 by default." if self._names_api() else ""
            return self._other_version(f"does not know the call {name} ({cause}).{hint} It")
        if code in _UNREACHABLE:
            return self._unreachable(name, f"{code.name}: {cause}")
        return VmferryError(
            Reason.INTERNAL,
            f"{name} to the destination {self._address} failed: {code.name}: {cause}.",
            "See the log of vmferryd there.",
        )

    def _names_api(self) -> bool:
        return self._address.endswith(f":{API_PORT}")

    def _unreachable(self, name: str, why: str) -> VmferryError:
        if self._tunnel is not None and self._tunnel.failure:
            why = self._tunnel.failure
        return VmferryError(
            Reason.DESTINATION_UNREACHABLE,
            f"{name} to the destination {self._address}: {why}.",
            "Check that vmferryd runs there, its [peer] listen address, and the network between the hosts.",
        )

    def _other_version(self, what: str) -> VmferryError:
        return VmferryError(
            Reason.DESTINATION_VERSION,
            f"The destination {self._address} {what}; this daemon speaks version {PROTOCOL_VERSION}.",
            "Run versions of vmferry on both hosts that speak the same peer protocol.",
        )
