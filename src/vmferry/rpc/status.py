"""Reasons as gRPC statuses with google.rpc rich details, and back. A test keeps the table complete.

An error travels as the table's status code, the message as details, `google.rpc.ErrorInfo` {reason, domain "vmferry",
metadata {"remedy": …}}, and `google.rpc.Help` with the section of the runbook. A program decides by the reason, never
by the code: gRPC itself also raises codes, e.g. UNAVAILABLE where no server listens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Any, NoReturn, TypeVar, cast

import grpc
import structlog
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from vmferry.errors import Reason, VmferryError
from vmferry.model.problems import runbook

log = structlog.get_logger()

DOMAIN = "vmferry"
RPC_CRASHED = "rpc.crashed"
DETAILS_KEY = "grpc-status-details-bin"
TEXT_LIMIT = 1000
"""The most bytes of message and of remedy. gRPC refuses metadata beyond 8 KiB, and the text travels twice: once
percent-encoded, once in base64.
"""

Answer = TypeVar("Answer")

_Code = grpc.StatusCode
CODE_OF: dict[Reason, grpc.StatusCode] = {
    Reason.INVALID_ARGUMENT: _Code.INVALID_ARGUMENT,
    Reason.PERMISSION_DENIED: _Code.PERMISSION_DENIED,
    Reason.VM_UNKNOWN: _Code.NOT_FOUND,
    Reason.VM_ALREADY_MIGRATING: _Code.FAILED_PRECONDITION,
    Reason.VM_NOT_RUNNING: _Code.FAILED_PRECONDITION,
    Reason.MIGRATION_UNKNOWN: _Code.NOT_FOUND,
    Reason.MIGRATION_EXISTS: _Code.ALREADY_EXISTS,
    Reason.MIGRATION_REFUSED: _Code.FAILED_PRECONDITION,
    Reason.MIGRATION_RUNNING: _Code.FAILED_PRECONDITION,
    Reason.MIGRATION_ENDED: _Code.FAILED_PRECONDITION,
    Reason.PAST_NO_RETURN: _Code.FAILED_PRECONDITION,
    Reason.CANCELLED: _Code.ABORTED,
    Reason.SHUTTING_DOWN: _Code.UNAVAILABLE,
    Reason.DESTINATION_UNREACHABLE: _Code.UNAVAILABLE,
    Reason.DESTINATION_VERSION: _Code.FAILED_PRECONDITION,
    Reason.DESTINATION_HAS_VM: _Code.FAILED_PRECONDITION,
    Reason.DESTINATION_NO_VMM: _Code.FAILED_PRECONDITION,
    Reason.DESTINATION_NO_MEMORY: _Code.RESOURCE_EXHAUSTED,
    Reason.LAYOUT_MISMATCH: _Code.FAILED_PRECONDITION,
    Reason.PLATFORM_MISMATCH: _Code.FAILED_PRECONDITION,
    Reason.VMM_GONE: _Code.ABORTED,
    Reason.VMM_REFUSED: _Code.FAILED_PRECONDITION,
    Reason.VMM_TIMEOUT: _Code.DEADLINE_EXCEEDED,
    Reason.VMM_PROTOCOL: _Code.INTERNAL,
    Reason.STATE_TOO_LARGE: _Code.FAILED_PRECONDITION,
    Reason.PAGER_FAILED: _Code.INTERNAL,
    Reason.KERNEL_LACKS_FEATURE: _Code.FAILED_PRECONDITION,
    Reason.LINK_DOWN: _Code.UNAVAILABLE,
    Reason.DOWNTIME_EXCEEDED: _Code.DEADLINE_EXCEEDED,
    Reason.UNDECIDED: _Code.UNAVAILABLE,
    Reason.STORE_FAILED: _Code.INTERNAL,
    Reason.INTERNAL: _Code.INTERNAL,
}


def rich_status(error: VmferryError) -> status_pb2.Status:
    """The `google.rpc.Status` of an error."""
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    if error.remedy:
        info.metadata["remedy"] = _cut(error.remedy)
    section = runbook(error.reason.value)
    link = error_details_pb2.Help.Link(description=f"Runbook: {error.reason}", url=section)
    details = []
    for message in (info, error_details_pb2.Help(links=[link])):
        detail = any_pb2.Any()
        detail.Pack(message)
        details.append(detail)
    code: int = CODE_OF[error.reason].value[0]
    return status_pb2.Status(code=code, message=_cut(error.message), details=details)


def _cut(text: str) -> str:
    return text.encode(errors="replace")[:TEXT_LIMIT].decode(errors="ignore")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: VmferryError) -> NoReturn:
    """Ends the call with the error."""
    status = rich_status(error)
    await context.abort(
        CODE_OF[error.reason], status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )


async def answered(context: grpc.aio.ServicerContext[Any, Any], work: Awaitable[Answer]) -> Answer:
    """Returns the result of `work`; its error ends the call. An error that is no VmferryError is logged and answered
    INTERNAL.
    """
    try:
        return await work
    except VmferryError as error:
        await abort(context, error)
    except grpc.aio.BaseError:
        raise
    except Exception:  # The edge of the process: a bug in one call becomes an answer.
        log.exception(RPC_CRASHED)
        await abort(context, VmferryError(Reason.INTERNAL, "The call failed inside vmferry.", "See the daemon's log."))


def error_of(rpc_error: grpc.aio.AioRpcError) -> VmferryError | None:
    """The vmferry error that ended a call. None: the status did not come from vmferry, or it was damaged.

    A reason that this version does not know becomes INTERNAL with its name in the message.
    """
    info = _error_info(rpc_error)
    if info is None or info.domain != DOMAIN:
        return None
    message, remedy = rpc_error.details() or "", info.metadata.get("remedy", "")
    if info.reason not in Reason.__members__:
        return VmferryError(Reason.INTERNAL, f"{info.reason}: {message}", remedy)
    return VmferryError(Reason(info.reason), message, remedy)


def _error_info(rpc_error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    metadata: Iterable[tuple[str, str | bytes]] = cast(Any, rpc_error.trailing_metadata()) or ()
    for key, value in metadata:
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info
        except DecodeError:
            return None
    return None
