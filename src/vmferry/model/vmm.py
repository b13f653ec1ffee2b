"""A VMM as it introduces itself to the daemon."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryKind, MemoryLayout
from vmferry.units import MIB

DEVICE_STATE_LIMIT = 64 * MIB
"""The largest device state that travels between two hosts. A control frame and a peer message hold it."""


def state_too_large(vm: str, size: int) -> VmferryError:
    """The error for a device state of `size` bytes, for the caller to raise."""
    return VmferryError(
        Reason.STATE_TOO_LARGE,
        f"the device state of {vm} has {size} bytes, and at most {DEVICE_STATE_LIMIT} can move.",
        "Unplug the devices with large states before the move.",
    )


SLOT_OF_STATE = {
    "running": "running",
    "stopped": "stopped",
    "incoming": "incoming",
    "prepared": "incoming",
    "loaded": "incoming",
}
"""A VM may have one VMM in each slot on a host."""


@dataclass(frozen=True, slots=True)
class VmmIdentity:
    """The contents of a VMM's `hello`. docs/reference/vmm-protocol.md lists the states."""

    vm: str
    pid: int
    platform: str
    vcpus: int
    layout: MemoryLayout
    abilities: frozenset[str]
    state: str
    memory: MemoryKind = field(default_factory=MemoryKind)
    """Used only while the VMM is a destination."""
    state_bytes: int = 0
    """The most bytes that its device state can have; 0: unknown."""
