"""Ends calls: results, refusals with rich details, streams. It adds the fields of a bad request to `rpc.status`."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from vmferry.api.validation import InvalidRequest, Violation
from vmferry.errors import VmferryError
from vmferry.rpc import status
from vmferry.rpc.caller import CALLER

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")
Item = TypeVar("Item")


async def answered(context: Context, work: Awaitable[Answer]) -> Answer:
    """Returns the result of `work`. Its error ends the call with `google.rpc` details."""

    async def refused_by_field() -> Answer:
        try:
            return await work
        except InvalidRequest as error:
            await _abort_bad_request(context, error)

    return await status.answered(context, refused_by_field())


async def streamed(context: Context, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
    """Yields the items until they end, or the client goes away and gRPC cancels this task. It always closes `items`."""
    iterator = items.__aiter__()
    async with aclosing(_Closing(iterator)):
        while (item := await answered(context, _next(iterator))) is not None:
            yield item


async def _next(iterator: AsyncIterator[Item]) -> Item | None:
    return await anext(iterator, None)


class _Closing:
    """Closes an iterator that can be closed, so that an async generator runs its `finally` clauses at once."""

    def __init__(self, iterator: AsyncIterator[object]) -> None:
        self._iterator = iterator

    async def aclose(self) -> None:
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()


async def _abort_bad_request(context: Context, error: InvalidRequest) -> NoReturn:
    rich = status.rich_status(error)
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.BadRequest(field_violations=[_field(v) for v in error.violations]))
    rich.details.append(detail)
    await context.abort(
        status.CODE_OF[error.reason],
        rich.message,
        trailing_metadata=((status.DETAILS_KEY, rich.SerializeToString()),),
    )


def caller(context: Context) -> str:
    """The caller as its gate knows it, else its address, e.g. "10.0.0.7"; "" if gRPC does not name it."""
    known = CALLER.get()
    if known not in ("", "anonymous"):
        return known
    kind, _, address = urllib.parse.unquote(context.peer() or "").partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return address.rpartition(":")[0].strip("[]")


def _field(violation: Violation) -> error_details_pb2.BadRequest.FieldViolation:
    return error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)


def invalid(field: str, description: str) -> VmferryError:
    """A request with one wrong field, for the caller to raise."""
    return InvalidRequest((Violation(field, description),))
