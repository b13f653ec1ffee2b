"""Reports each call of a gRPC server: its name, the code of its end, and the time of a unary call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc

Report: TypeAlias = Callable[[str, str, float | None], None]
"""(full name, code, seconds); None: a stream."""

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


PACKAGE = "/vmferry."
"""Only vmferry's own services are reported: health and reflection are the libraries'."""


if TYPE_CHECKING:
    Interceptor: TypeAlias = grpc.aio.ServerInterceptor[Any, Any]
else:
    Interceptor = grpc.aio.ServerInterceptor


class CallReporter(Interceptor):
    """An interceptor of a `grpc.aio.server`. Calls of unknown methods pass unseen: a caller chooses their names."""

    def __init__(self, report: Report) -> None:
        self._report = report

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        name = handler_call_details.method
        if not name.startswith(PACKAGE):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(name, handler.unary_unary),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(name, handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return handler

    def _unary(self, name: str, work: Any) -> Any:
        async def called(request: Any, context: Context) -> Any:
            began_s = time.monotonic()
            try:
                return await work(request, context)
            finally:
                self._report(name, _code(context), time.monotonic() - began_s)

        return called

    def _stream(self, name: str, work: Any) -> Any:
        async def called(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async with aclosing(work(request, context)) as answers:
                    async for answer in answers:
                        yield answer
            finally:
                self._report(name, _code(context), None)

        return called


def _code(context: Context) -> str:
    """The code that the servicer has set; a call that ended without one is OK, or CANCELLED by its caller."""
    number = context.code()
    if isinstance(number, grpc.StatusCode):
        return number.name
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    return names.get(int(number or 0), "UNKNOWN")
