"""The check before each call of a gRPC server: may this caller make it? It writes the audit log."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.rpc.caller import CALLER
from vmferry.rpc.status import abort
from vmferry.security.audit import AuditLog
from vmferry.security.caller import Caller
from vmferry.security.refusal import Cause, Refusals

log = structlog.stdlib.get_logger()

CALL_REFUSED = "call.refused"
FIELDS = ("migration_id", "migration", "vm", "destination", "gpa", "monitor", "push_bytes_per_s", "source_host")
"""The fields of a request that an audit line names."""
VALUE_LIMIT = 200

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Decide: TypeAlias = Callable[[Caller | None, str], str | None]
"""The reason to refuse a caller's call by its path; None: it is permitted."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The rights of one port. `changes` tells by a call's path whether the audit log has it."""

    problem: Decide
    changes: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Records:
    """The places where a gate writes."""

    audit: AuditLog
    refusals: Refusals


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # It is generic in the stubs alone.
    """Stands before the servicers of one port."""

    def __init__(self, port: str, caller: Callable[[str], Caller | None], rule: Rule, records: Records) -> None:
        """`caller` finds the caller by `ServicerContext.peer()`."""
        self._port = port
        self._caller = caller
        self._rule = rule
        self._audit = records.audit
        self._refusals = records.refusals

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        kinds = {
            (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
            (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
            (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
            (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
        }
        name, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
        guarded = self._guarded(method, getattr(handler, name))
        return make(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, work: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
        if inspect.isasyncgenfunction(work):

            async def streamed(request: Any, context: Context) -> AsyncIterator[Any]:
                caller = await self._admit(method, request, context)
                try:
                    async for item in work(request, context):
                        yield item
                finally:
                    self._note(method, request, context, caller)

            return streamed

        async def answered(request: Any, context: Context) -> Any:
            caller = await self._admit(method, request, context)
            try:
                return await cast(Awaitable[Any], work(request, context))
            finally:
                self._note(method, request, context, caller)

        return answered

    async def _admit(self, method: str, request: Any, context: Context) -> Caller | None:
        """Returns the caller. A call that has ended has no peer: grpc would end the process."""
        caller = self._caller(context.peer())
        problem = self._rule.problem(caller, method)
        if problem is not None:
            self._refusals.note(self._port, Cause.NOT_PERMITTED)
            log.warning(CALL_REFUSED, port=self._port, call=method, peer=_where(caller), error=problem)
            self._audit.note(self._record(method, request, caller, "PERMISSION_DENIED"))
            remedy = "Name the caller under a role of [access] in vmferryd.toml."
            await abort(context, VmferryError(Reason.PERMISSION_DENIED, f"{problem}.", remedy))
        CALLER.set(str(caller or ""))
        return caller

    def _note(self, method: str, request: Any, context: Context, caller: Caller | None) -> None:
        code = context.code()
        if code is grpc.StatusCode.PERMISSION_DENIED:
            self._refusals.note(self._port, Cause.FOREIGN_MIGRATION)
            log.warning(CALL_REFUSED, port=self._port, call=method, peer=_where(caller))
        if self._rule.changes(method):
            name = code.name if isinstance(code, grpc.StatusCode) else "OK" if not code else str(code)
            self._audit.note(self._record(method, request, caller, name))

    def _record(self, method: str, request: Any, caller: Caller | None, outcome: str) -> dict[str, object]:
        on = {name: _short(getattr(request, name)) for name in FIELDS if getattr(request, name, None)}
        return {
            "port": self._port,
            "who": str(caller) if caller else "anonymous",
            "from": _where(caller),
            "call": method,
            "on": on,
            "outcome": outcome,
        }


def _where(caller: Caller | None) -> str:
    return caller.address if caller else "unknown"


def _short(value: object) -> object:
    return value if isinstance(value, int) else str(value)[:VALUE_LIMIT]
