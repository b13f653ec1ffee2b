# ruff: noqa: ASYNC110 these tests poll the stand-in, which has no signal
"""Client and servicer over a real connection on loopback, with a recording stand-in for the core behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from tests.support.late_listener import late_listener
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import HELD_MAX
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion, PageRange
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Outcome, PageProgress
from vmferry.peer import contract
from vmferry.peer.client import GrpcPeer, GrpcPeers, PeerDeadlines
from vmferry.peer.servicer import PeerServicer
from vmferry.rpc.convert import layout_to_pb
from vmferry.units import GIB, MIB, Gpa
from vmferry.v1 import peer_pb2 as pb
from vmferry.v1.peer_pb2_grpc import PeerStub, add_PeerServicer_to_server

LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), 4 * MIB, 4096, Backing.MEMFD),))
HELD = (PageRange(0, 0, 3), PageRange(0, 1000, 24))
ENTRY = LedgerEntry(Gpa(0x5000), Origin.READ, count=3)
JOB = "0123456789abcdef" * 2
WANTED = Wanted("web-1", LAYOUT, 2, "x86_64/kvm", "127.0.0.1:7700", "token", (ENTRY,), HELD)


class Recorder:
    """Answers every call, or raises `error`. It keeps the arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.forever = False
        self.given_up = False
        self.updates: list[IncomingUpdate] = []
        self.jobs: dict[str, str] = {}

    async def admit(self, migration: str, job: str, source: str | None = None) -> None:
        if self.jobs.setdefault(migration, job) != job:
            raise VmferryError(Reason.MIGRATION_EXISTS, f"{migration} is another job's.", "Take another name.")

    async def _record(self, *call: Any) -> None:
        self.calls.append(call)
        if self.forever:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up = True
        if self.error is not None:
            raise self.error

    async def hello(self, migration: str) -> str:
        await self._record("hello", migration)
        return "host-b"

    async def prepare(self, migration: str, wanted: Wanted, source_host: str) -> None:
        await self._record("prepare", migration, wanted, source_host)

    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None:
        await self._record("ready", migration, device_state, list(ledger))

    async def start(self, migration: str) -> int:
        await self._record("start", migration)
        return 1_700_000_000_000_000

    async def refuse(self, migration: str, reason: str) -> None:
        await self._record("refuse", migration, reason)

    async def outcome(self, migration: str) -> tuple[Outcome, str]:
        await self._record("outcome", migration)
        return Outcome.REFUSED, "because"

    async def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]:
        for update in self.updates:
            yield update
        await self._record("watch", migration)

    async def finish(self, migration: str) -> None:
        await self._record("finish", migration)


class Loopback:
    """A destination on a free port."""

    def __init__(self) -> None:
        self.core = Recorder()
        self.server = grpc.aio.server(options=contract.server_options())
        add_PeerServicer_to_server(PeerServicer(self.core), self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"


@pytest.fixture
async def loopback() -> AsyncIterator[Loopback]:
    destination = Loopback()
    await destination.server.start()
    yield destination
    await destination.server.stop(None)


@pytest.fixture
async def peer(loopback: Loopback) -> AsyncIterator[GrpcPeer]:
    client = GrpcPeers("host-a").connect(loopback.address, JOB)
    yield client
    await client.close()


async def test_every_call_arrives_with_its_values(loopback: Loopback, peer: GrpcPeer) -> None:
    state = bytes(range(256)) * 4096 * 64
    assert len(state) == contract.DEVICE_STATE_LIMIT
    assert await peer.hello("m1") == "host-b"
    await peer.prepare("m1", WANTED)
    await peer.ready("m1", state, [ENTRY])
    assert await peer.start("m1") == 1_700_000_000_000_000
    await peer.refuse("m1", "no")
    assert await peer.outcome("m1") == (Outcome.REFUSED, "because")
    await peer.finish("m1")
    assert loopback.core.calls == [
        ("hello", "m1"),
        ("prepare", "m1", WANTED, "host-a"),
        ("ready", "m1", state, [ENTRY]),
        ("start", "m1"),
        ("refuse", "m1", "no"),
        ("outcome", "m1"),
        ("finish", "m1"),
    ]


async def test_watch_ends_with_the_destinations_stream(loopback: Loopback, peer: GrpcPeer) -> None:
    loopback.core.updates = [
        IncomingUpdate(Outcome.RUNNING, PageProgress(total=3, absent=3), "link lost", (ENTRY,)),
        IncomingUpdate(Outcome.COMPLETED, PageProgress(total=3, push=3), "", ()),
    ]
    assert [update async for update in peer.watch("m1")] == loopback.core.updates


@pytest.mark.parametrize("reason", [Reason.DESTINATION_NO_VMM, Reason.MIGRATION_REFUSED, Reason.MIGRATION_UNKNOWN])
async def test_the_destinations_own_reason_is_passed_through(
    loopback: Loopback, peer: GrpcPeer, reason: Reason
) -> None:
    loopback.core.error = VmferryError(reason, "What happened.", "What to do.")
    with pytest.raises(VmferryError) as caught:
        await peer.prepare("m1", WANTED)
    assert (caught.value.reason, caught.value.message, caught.value.remedy) == (reason, "What happened.", "What to do.")
    with pytest.raises(VmferryError) as caught:
        _ = [update async for update in peer.watch("m1")]
    assert caught.value.reason is reason


async def test_a_bug_behind_the_servicer_is_internal_and_tells_nothing(loopback: Loopback, peer: GrpcPeer) -> None:
    loopback.core.error = KeyError("secret")
    with pytest.raises(VmferryError) as caught:
        await peer.start("m1")
    assert caught.value.reason is Reason.INTERNAL
    assert "secret" not in str(caught.value)


async def test_nobody_listens_names_address_and_cause(loopback: Loopback, peer: GrpcPeer) -> None:
    await loopback.server.stop(None)
    with pytest.raises(VmferryError) as caught:
        await peer.hello("m1")
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert loopback.address in caught.value.message
    assert "refused" in caught.value.message.lower()


async def test_no_answer_in_time_is_unreachable(loopback: Loopback) -> None:
    loopback.core.forever = True
    client = GrpcPeers("host-a", PeerDeadlines(start_s=0.3)).connect(loopback.address, JOB)
    with pytest.raises(VmferryError) as caught:
        await client.start("m1")
    await client.close()
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert "DEADLINE_EXCEEDED" in caught.value.message


async def test_watch_notices_that_the_destination_went(loopback: Loopback, peer: GrpcPeer) -> None:
    loopback.core.updates = [IncomingUpdate(Outcome.RUNNING, PageProgress(), "", ())]
    loopback.core.forever = True
    stream = peer.watch("m1")
    await anext(stream)
    await loopback.server.stop(None)
    with pytest.raises(VmferryError) as caught:
        await anext(stream)
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE


async def test_another_version_is_refused_by_the_destination(loopback: Loopback) -> None:
    async with grpc.aio.insecure_channel(loopback.address, options=contract.channel_options()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await PeerStub(channel).Hello(
                pb.HelloRequest(protocol_version=contract.PROTOCOL_VERSION + 1, migration="m1", job=JOB)
            )
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert loopback.core.calls == []


class OtherVersion:
    """A destination with the next version of the protocol."""

    async def hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        return pb.HelloReply(protocol_version=contract.PROTOCOL_VERSION + 1, host="host-b")


@pytest.mark.parametrize("implements_hello", [True, False])
async def test_another_version_is_refused_by_the_source(implements_hello: bool) -> None:
    server = grpc.aio.server()
    handlers = {}
    if implements_hello:
        handlers["Hello"] = grpc.unary_unary_rpc_method_handler(
            OtherVersion().hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vmferry.v1.Peer", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = GrpcPeers("host-a").connect(address, JOB)
    with pytest.raises(VmferryError) as caught:
        await client.hello("m1")
    await client.close()
    await server.stop(None)
    assert caught.value.reason is Reason.DESTINATION_VERSION
    assert address in caught.value.message


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Prepare", pb.PrepareRequest(migration="M1"), "migration"),
        ("Prepare", pb.PrepareRequest(migration="m1", job=JOB, vm="../x"), "vm"),
        ("Prepare", pb.PrepareRequest(migration="m1", job=JOB, vm="a", vcpus=0), "vcpus"),
        ("Prepare", pb.PrepareRequest(migration="m1", job=JOB, vm="a", vcpus=1), "layout.regions"),
        (
            "Prepare",
            pb.PrepareRequest(migration="m1", job=JOB, vm="a", vcpus=1, layout=layout_to_pb(LAYOUT)),
            "lane_address",
        ),
        ("Prepare", pb.PrepareRequest(migration="m1"), "job"),
        ("Hello", pb.HelloRequest(protocol_version=contract.PROTOCOL_VERSION, migration="m1", job="x" * 32), "job"),
        ("Start", pb.StartRequest(), "migration"),
        ("Start", pb.StartRequest(migration="m1", job=JOB[1:]), "job"),
        ("GetOutcome", pb.GetOutcomeRequest(migration="-"), "migration"),
    ],
)
async def test_malformed_requests_name_the_field(loopback: Loopback, method: str, request_: Any, field: str) -> None:
    async with grpc.aio.insecure_channel(loopback.address, options=contract.channel_options()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(PeerStub(channel), method)(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}: ")
    assert loopback.core.calls == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.SwitchoverRequest(), "step"),
        (pb.SwitchoverRequest(ready=pb.ReadyRequest()), "migration"),
        (pb.SwitchoverRequest(start=pb.StartRequest(migration="M1")), "migration"),
    ],
)
async def test_malformed_steps_of_a_switchover_name_the_field(
    loopback: Loopback, request_: pb.SwitchoverRequest, field: str
) -> None:
    async with grpc.aio.insecure_channel(loopback.address, options=contract.channel_options()) as channel:
        call = PeerStub(channel).Switchover()
        await call.write(request_)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}: ")
    assert loopback.core.calls == []


@pytest.mark.parametrize("step", ["ready", "start"])
async def test_an_error_of_a_switchover_is_the_destinations_own(loopback: Loopback, peer: GrpcPeer, step: str) -> None:
    await peer.prepare("m1", WANTED)
    loopback.core.error = VmferryError(Reason.MIGRATION_REFUSED, "What happened.", "What to do.")
    with pytest.raises(VmferryError) as caught:
        await (peer.ready("m1", b"state", []) if step == "ready" else peer.start("m1"))
    assert (caught.value.reason, caught.value.message) == (Reason.MIGRATION_REFUSED, "What happened.")


async def test_a_start_whose_answer_was_lost_is_asked_again_in_a_call_of_its_own(loopback: Loopback) -> None:
    client = GrpcPeers("host-a", PeerDeadlines(start_s=0.3)).connect(loopback.address, JOB)
    await client.prepare("m1", WANTED)
    await client.ready("m1", b"state", [])
    loopback.core.forever = True
    with pytest.raises(VmferryError) as caught:
        await client.start("m1")
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert "no answer within 0.3 s" in caught.value.message
    loopback.core.forever = False
    assert await client.start("m1") == 1_700_000_000_000_000
    assert loopback.core.calls[-2:] == [("start", "m1")] * 2
    await client.close()


@pytest.mark.parametrize("step", ["ready", "start"])
async def test_a_destination_that_went_before_a_step_of_the_switchover(
    loopback: Loopback, peer: GrpcPeer, step: str
) -> None:
    await peer.prepare("m1", WANTED)
    await loopback.server.stop(None)
    with pytest.raises(VmferryError) as caught:
        await (peer.ready("m1", b"state", []) if step == "ready" else peer.start("m1"))
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert loopback.address in caught.value.message


async def test_a_destination_that_was_restarted_before_ready_is_called_anew(loopback: Loopback, peer: GrpcPeer) -> None:
    await peer.prepare("m1", WANTED)
    await loopback.server.stop(None)
    loopback.server = grpc.aio.server(options=contract.server_options())
    add_PeerServicer_to_server(PeerServicer(loopback.core), loopback.server)
    loopback.server.add_insecure_port(loopback.address)
    await loopback.server.start()
    async with asyncio.timeout(patient(20)):
        while peer._switchover is not None and not peer._switchover.done():
            await asyncio.sleep(0.001)
    await peer.ready("m1", b"state", [])
    assert await peer.start("m1") == 1_700_000_000_000_000


async def test_a_ready_that_is_given_up_ends_on_the_destination(loopback: Loopback, peer: GrpcPeer) -> None:
    await peer.prepare("m1", WANTED)
    loopback.core.forever = True
    asking = asyncio.create_task(peer.ready("m1", b"state", []))
    async with asyncio.timeout(patient(20)):
        while loopback.core.calls[-1][0] != "ready":
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.wait([asking])
        while not loopback.core.given_up:
            await asyncio.sleep(0.001)
    assert asking.cancelled()


async def test_as_many_ranges_as_there_may_be_arrive(loopback: Loopback, peer: GrpcPeer) -> None:
    layout = MemoryLayout((replace(LAYOUT.regions[0], size=2 * HELD_MAX * 4096),))
    held = tuple(PageRange(0, 2 * number, 1) for number in range(HELD_MAX))
    await peer.prepare("m1", replace(WANTED, layout=layout, held=held))
    assert loopback.core.calls[-1][2].held == held
    with pytest.raises(VmferryError, match=f"held: has {HELD_MAX + 1} ranges, may have {HELD_MAX}"):
        await peer.prepare("m1", replace(WANTED, layout=layout, held=(*held, PageRange(0, 2 * HELD_MAX - 1, 1))))


async def test_prepare_has_the_time_that_its_memory_takes() -> None:
    left_s: list[float] = []

    async def prepare(request: pb.PrepareRequest, context: Any) -> pb.PrepareReply:
        left_s.append(context.time_remaining())
        return pb.PrepareReply()

    async def switchover(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await context.send_initial_metadata(())
        async for request in requests:
            yield request

    handler = grpc.unary_unary_rpc_method_handler(
        prepare, pb.PrepareRequest.FromString, pb.PrepareReply.SerializeToString
    )
    server = grpc.aio.server()
    handlers = {"Prepare": handler, "Switchover": grpc.stream_stream_rpc_method_handler(switchover)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vmferry.v1.Peer", handlers),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    client = GrpcPeers("host-a", PeerDeadlines(prepare_s=60.0)).connect(address, JOB)
    await client.prepare("m1", replace(WANTED, held=()))
    await client.prepare("m1", replace(WANTED, held=(PageRange(0, 0, GIB // 4096 * 1024),)))
    await client.close()
    await server.stop(None)
    assert left_s[0] < 61
    assert 4096 < left_s[1] < 4200


async def test_a_far_or_busy_destination_is_reached(loopback: Loopback) -> None:
    """A connection takes two round trips, and its first bytes wait for a daemon that is busy."""
    _, port = loopback.address.split(":")
    async with late_listener(
        lambda serve: asyncio.start_server(serve, "127.0.0.1", 0),
        lambda: asyncio.open_connection("127.0.0.1", int(port)),
        late_s=0.7,
    ) as listener:
        host, late_port = listener.sockets[0].getsockname()
        client = GrpcPeers("host-a").connect(f"{host}:{late_port}", JOB)
        assert await client.hello("m1") == "host-b"
        await client.close()


async def test_a_destination_that_says_nothing_is_named_with_the_cause(loopback: Loopback) -> None:
    """The attempt to connect ends before the call does."""
    async with late_listener(
        lambda serve: asyncio.start_server(serve, "127.0.0.1", 0), asyncio.Future, late_s=0
    ) as listener:
        host, port = listener.sockets[0].getsockname()
        client = GrpcPeers("host-a", PeerDeadlines(hello_s=0.5)).connect(f"{host}:{port}", JOB)
        with pytest.raises(VmferryError) as caught:
            await client.hello("m1")
        await client.close()
    assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
    assert "connect" in caught.value.message


async def test_a_large_state_has_the_time_that_a_slow_network_takes() -> None:
    """Deadlines grow with the size of the message and of the held memory."""
    assert contract.transfer_s(contract.DEVICE_STATE_LIMIT) == pytest.approx(64.0)


async def test_another_job_of_the_same_id_is_refused_in_every_call(loopback: Loopback, peer: GrpcPeer) -> None:
    await peer.prepare("m1", WANTED)
    stranger = GrpcPeers("host-c").connect(loopback.address, JOB[::-1])
    calls = loopback.core.calls.copy()
    asked = {
        "hello": lambda: stranger.hello("m1"),
        "prepare": lambda: stranger.prepare("m1", WANTED),
        "ready": lambda: stranger.ready("m1", b"state", []),
        "start": lambda: stranger.start("m1"),
        "outcome": lambda: stranger.outcome("m1"),
        "watch": lambda: anext(stranger.watch("m1")),
        "finish": lambda: stranger.finish("m1"),
    }
    for name, ask in asked.items():
        with pytest.raises(VmferryError) as caught:
            await ask()
        assert caught.value.reason is Reason.MIGRATION_EXISTS, name
    await stranger.refuse("m1", "nothing of that job is here")
    await stranger.close()
    assert loopback.core.calls == calls
