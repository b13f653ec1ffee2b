"""The destination's servicer. It checks and converts requests; `IncomingOperations` decides."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import grpc

from vmferry.errors import Reason, VmferryError
from vmferry.model.facts import HostFacts
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Outcome
from vmferry.model.names import MIGRATION_ID, NONCE, VM_NAME, is_migration_id, is_nonce, is_vm_name
from vmferry.peer import convert
from vmferry.peer.contract import PROTOCOL_VERSION
from vmferry.rpc import convert as wire
from vmferry.rpc.status import answered
from vmferry.v1 import common_pb2
from vmferry.v1 import peer_pb2 as pb
from vmferry.v1.peer_pb2_grpc import PeerServicer as GeneratedServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class IncomingOperations(Protocol):
    """The part of the core that this servicer calls. It mirrors `ports.Peer`.

    `admit` binds `migration` to one job, and to the host `source` that the caller's certificate names. None: callers
    have no certificates. Every other method is idempotent by `migration`. A call is cancelled if its
    caller goes away or its deadline passes. The implementation finishes indivisible work in a task of its own.
    """

    async def admit(self, migration: str, job: str, source: str | None = None) -> None: ...
    async def hello(self, migration: str) -> str: ...
    async def prepare(self, migration: str, wanted: Wanted, source_host: str) -> None: ...
    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None: ...
    async def start(self, migration: str) -> int: ...
    async def refuse(self, migration: str, reason: str) -> None: ...
    async def outcome(self, migration: str) -> tuple[Outcome, str]: ...
    def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]: ...
    async def finish(self, migration: str) -> None: ...
    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]: ...


class PeerServicer(GeneratedServicer):
    """The servicer. Serve it with `contract.server_options`."""

    def __init__(
        self, operations: IncomingOperations, source_of: Callable[[Context], str | None] = lambda _: None
    ) -> None:
        """`source_of`: the host that the caller's certificate names. None: callers have no certificates."""
        self._operations = operations
        self._source_of = source_of

    async def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloReply:  # noqa: N802 gRPC's name
        return await answered(context, self._hello(request, self._source_of(context)))

    async def Prepare(self, request: pb.PrepareRequest, context: Context) -> pb.PrepareReply:  # noqa: N802
        return await answered(context, self._prepare(request, self._source_of(context)))

    async def Switchover(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SwitchoverRequest], context: Context
    ) -> AsyncIterator[pb.SwitchoverReply]:
        source = self._source_of(context)  # Once: a call that has ended has no peer.
        await context.send_initial_metadata(())
        async for request in request_iterator:
            yield await answered(context, self._switchover(request, source))

    async def Start(self, request: pb.StartRequest, context: Context) -> pb.StartReply:  # noqa: N802
        return await answered(context, self._start(request, self._source_of(context)))

    async def Refuse(self, request: pb.RefuseRequest, context: Context) -> pb.RefuseReply:  # noqa: N802
        return await answered(context, self._refuse(request, self._source_of(context)))

    async def GetOutcome(self, request: pb.GetOutcomeRequest, context: Context) -> pb.GetOutcomeReply:  # noqa: N802
        return await answered(context, self._get_outcome(request, self._source_of(context)))

    async def WatchIncoming(  # noqa: N802
        self, request: pb.WatchIncomingRequest, context: Context
    ) -> AsyncIterator[pb.IncomingUpdate]:
        await answered(context, self._admit(request.migration, request.job, self._source_of(context)))
        updates = aiter(self._operations.watch(request.migration))
        while (update := await answered(context, anext(updates, None))) is not None:
            yield convert.update_to_pb(update)

    async def Finish(self, request: pb.FinishRequest, context: Context) -> pb.FinishReply:  # noqa: N802
        return await answered(context, self._finish(request, self._source_of(context)))

    async def ExchangeFacts(  # noqa: N802
        self, request: pb.ExchangeFactsRequest, context: Context
    ) -> pb.ExchangeFactsReply:
        return await answered(context, self._exchange(request, self._source_of(context)))

    async def _exchange(self, request: pb.ExchangeFactsRequest, source: str | None) -> pb.ExchangeFactsReply:
        await self._admit(request.migration, request.job, source)
        told = convert.facts_from_pb(request.facts)
        facts, heard = await self._operations.exchange(request.migration, told, request.heard)
        return pb.ExchangeFactsReply(facts=convert.facts_to_pb(facts), heard=heard)

    async def _admit(self, migration: str, job: str, source: str | None) -> None:
        if not is_migration_id(migration):
            raise wire.invalid("migration", f"{migration!r} is not {MIGRATION_ID}")
        if not is_nonce(job):
            raise wire.invalid("job", f"{job!r} is not {NONCE}")
        await self._operations.admit(migration, job, source)

    async def _hello(self, request: pb.HelloRequest, source: str | None) -> pb.HelloReply:
        if request.protocol_version != PROTOCOL_VERSION:
            raise VmferryError(
                Reason.DESTINATION_VERSION,
                f"The source speaks version {request.protocol_version} of the peer protocol, "
                f"the destination version {PROTOCOL_VERSION}.",
                "Run versions of vmferry on both hosts that speak the same peer protocol.",
            )
        await self._admit(request.migration, request.job, source)
        host = await self._operations.hello(request.migration)
        return pb.HelloReply(protocol_version=PROTOCOL_VERSION, host=host)

    async def _prepare(self, request: pb.PrepareRequest, source: str | None) -> pb.PrepareReply:
        await self._admit(request.migration, request.job, source)
        if source is not None and request.source_host != source:
            raise wire.invalid("source_host", f"{request.source_host!r} is not {source!r}, that of the certificate")
        if not is_vm_name(request.vm):
            raise wire.invalid("vm", f"{request.vm!r} is not {VM_NAME}")
        if request.vcpus == 0:
            raise wire.invalid("vcpus", "is 0, must be at least 1")
        layout = wire.layout_from_pb(request.layout)
        if not request.lane_address:
            raise wire.invalid("lane_address", "is empty")
        wanted = Wanted(
            vm=request.vm,
            layout=layout,
            vcpus=request.vcpus,
            platform=request.platform,
            lane_address=request.lane_address,
            lane_token=request.lane_token,
            ledger=_ledger(request.ledger),
            held=wire.held_from_pb(request.held, layout),
        )
        await self._operations.prepare(request.migration, wanted, request.source_host)
        return pb.PrepareReply()

    async def _switchover(self, request: pb.SwitchoverRequest, source: str | None) -> pb.SwitchoverReply:
        match request.WhichOneof("step"):
            case "ready":
                return pb.SwitchoverReply(ready=await self._ready(request.ready, source))
            case "start":
                return pb.SwitchoverReply(start=await self._start(request.start, source))
            case _:
                raise wire.invalid("step", "is missing")

    async def _ready(self, request: pb.ReadyRequest, source: str | None) -> pb.ReadyReply:
        await self._admit(request.migration, request.job, source)
        await self._operations.ready(request.migration, request.device_state, _ledger(request.ledger))
        return pb.ReadyReply()

    async def _start(self, request: pb.StartRequest, source: str | None) -> pb.StartReply:
        await self._admit(request.migration, request.job, source)
        began_s = time.monotonic()
        started_us = await self._operations.start(request.migration)
        return pb.StartReply(started_us=started_us, start_s=time.monotonic() - began_s)

    async def _refuse(self, request: pb.RefuseRequest, source: str | None) -> pb.RefuseReply:
        try:
            await self._admit(request.migration, request.job, source)
        except VmferryError as error:
            if error.reason is Reason.MIGRATION_EXISTS:
                return pb.RefuseReply()  # Nothing of that job is here, and nothing of it can come.
            raise
        await self._operations.refuse(request.migration, request.reason)
        return pb.RefuseReply()

    async def _get_outcome(self, request: pb.GetOutcomeRequest, source: str | None) -> pb.GetOutcomeReply:
        await self._admit(request.migration, request.job, source)
        outcome, reason = await self._operations.outcome(request.migration)
        return pb.GetOutcomeReply(outcome=convert.outcome_to_pb(outcome), reason=reason)

    async def _finish(self, request: pb.FinishRequest, source: str | None) -> pb.FinishReply:
        await self._admit(request.migration, request.job, source)
        await self._operations.finish(request.migration)
        return pb.FinishReply()


def _ledger(errors: Iterable[common_pb2.MemoryError]) -> tuple[LedgerEntry, ...]:
    return tuple(wire.error_from_pb(error, f"ledger[{index}]") for index, error in enumerate(errors))
