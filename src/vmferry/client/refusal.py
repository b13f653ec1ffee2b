"""The ends of a failed call, read from the rich error details of a gRPC status."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

T = TypeVar("T")
ERROR_DOMAIN = "vmferry"
_GRPC_PREFIX = "failed to connect to all addresses; last error: "

REMEDIES = {
    "VM_UNKNOWN": "`vmferry machines` lists the VMs that this daemon knows.",
    "MIGRATION_UNKNOWN": "`vmferry list` lists the migrations that this daemon knows.",
    "MIGRATION_EXISTS": "Choose another --id, or `vmferry show` the one that is there.",
    "VM_ALREADY_MIGRATING": "`vmferry list --filter 'active = true'` shows the migration under way.",
    "VM_NOT_RUNNING": "Start the VM, or wait until its VMM has connected; `vmferry machines` shows its state.",
    "MIGRATION_ENDED": "`vmferry show` tells how it ended.",
    "PAST_NO_RETURN": "The VM runs on the destination already; `vmferry show` tells how it gets on.",
    "DOWNTIME_EXCEEDED": "Look at the host and the step that the message names; or raise timeouts.downtime_s.",
    "DESTINATION_UNREACHABLE": "Check that vmferryd runs there and that its [peer] address is the one given by --to.",
    "DESTINATION_NO_VMM": "Start a VMM of that name on the destination that waits to be one (`--incoming`).",
}
"""The remedy for a reason where the daemon gave none."""


class ApiError(Exception):
    """A call without an answer. `reason` is for programs, `remedy` for the operator; either may be empty."""

    def __init__(self, reason: str, message: str, remedy: str = "", runbook: str = "") -> None:
        super().__init__(message)
        self.runbook = runbook
        self.reason = reason
        self.message = message
        self.remedy = remedy


class RefusedError(ApiError):
    """The daemon answered, with an error."""


class UnreachableError(ApiError):
    """No daemon answered at that address."""


class TimedOutError(ApiError):
    """No answer within the deadline. The call may have taken effect."""


def refusal(error: grpc.RpcError) -> ApiError:
    """Classifies an error of gRPC."""
    code, text = error.code(), error.details() or ""
    info, words, link = _details(error)
    if info is not None:
        remedy = words or info.metadata.get("remedy", "") or REMEDIES.get(info.reason, "")
        return RefusedError(info.reason, _without_remedy(text, remedy), remedy, link)
    if code is grpc.StatusCode.UNAVAILABLE:
        words = text.removeprefix(_GRPC_PREFIX).removeprefix("UNKNOWN: ")
        return UnreachableError(
            "UNREACHABLE", f"no daemon answers: {words}", "Start vmferryd, or give its address by --api or VMFERRY_API."
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOutError("DEADLINE_EXCEEDED", "no answer in time", "Give it longer with --timeout SECONDS.")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return RefusedError("UNIMPLEMENTED", text, "What listens there is not a vmferryd of this version; check --api.")
    return RefusedError(code.name, text)


def _details(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, str, str]:
    """The ErrorInfo of vmferry, if any, the words of a LocalizedMessage and the link of a Help next to it."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # AioRpcError has what is read
    except ValueError:  # The details contradict the status, so no vmferryd sent them.
        return None, "", ""
    info: error_details_pb2.ErrorInfo | None = None
    words = link = ""
    for detail in status.details if status is not None else ():
        candidate, local = error_details_pb2.ErrorInfo(), error_details_pb2.LocalizedMessage()
        help_ = error_details_pb2.Help()
        if detail.Unpack(candidate) and candidate.domain == ERROR_DOMAIN:
            info = candidate
        elif detail.Unpack(local):
            words = local.message
        elif detail.Unpack(help_) and help_.links:
            link = help_.links[0].url
    return info, words, link


def _without_remedy(text: str, remedy: str) -> str:
    """Cuts the remedy off the end of the message: it is printed on its own line."""
    return text.removesuffix(remedy).rstrip() if remedy else text


async def answered(call: Awaitable[T]) -> T:
    """The answer of one call.

    Raises:
        RefusedError, UnreachableError, TimedOutError: their docstrings tell when.
    """
    try:
        return await call
    except grpc.RpcError as error:
        raise refusal(error) from None
