"""The root of all exceptions and the reason codes that the API, the journal and the documents share.

An error names the fact, the values that show it, and the remedy. `rpc/status.py` maps each `Reason` to one gRPC status;
docs/reference/errors.md lists them.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The reason of a refusal, a failure or a pause. The text is the `ErrorInfo.reason` of the API."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    VM_UNKNOWN = "VM_UNKNOWN"
    VM_ALREADY_MIGRATING = "VM_ALREADY_MIGRATING"
    VM_NOT_RUNNING = "VM_NOT_RUNNING"
    MIGRATION_UNKNOWN = "MIGRATION_UNKNOWN"
    MIGRATION_EXISTS = "MIGRATION_EXISTS"
    MIGRATION_REFUSED = "MIGRATION_REFUSED"
    MIGRATION_RUNNING = "MIGRATION_RUNNING"
    MIGRATION_ENDED = "MIGRATION_ENDED"
    PAST_NO_RETURN = "PAST_NO_RETURN"
    CANCELLED = "CANCELLED"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    DESTINATION_UNREACHABLE = "DESTINATION_UNREACHABLE"
    DESTINATION_VERSION = "DESTINATION_VERSION"
    DESTINATION_HAS_VM = "DESTINATION_HAS_VM"
    DESTINATION_NO_VMM = "DESTINATION_NO_VMM"
    DESTINATION_NO_MEMORY = "DESTINATION_NO_MEMORY"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    PLATFORM_MISMATCH = "PLATFORM_MISMATCH"
    VMM_GONE = "VMM_GONE"
    VMM_REFUSED = "VMM_REFUSED"
    VMM_TIMEOUT = "VMM_TIMEOUT"
    VMM_PROTOCOL = "VMM_PROTOCOL"
    STATE_TOO_LARGE = "STATE_TOO_LARGE"
    PAGER_FAILED = "PAGER_FAILED"
    KERNEL_LACKS_FEATURE = "KERNEL_LACKS_FEATURE"
    LINK_DOWN = "LINK_DOWN"
    DOWNTIME_EXCEEDED = "DOWNTIME_EXCEEDED"
    UNDECIDED = "UNDECIDED"
    STORE_FAILED = "STORE_FAILED"
    INTERNAL = "INTERNAL"


class VmferryError(Exception):
    """The root of all errors that vmferry raises on purpose.

    `reason` is stable and for programs. `message` names the actual values. `remedy` is the operator's next step.
    """

    def __init__(self, reason: Reason, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()
