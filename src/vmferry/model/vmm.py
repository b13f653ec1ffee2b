"""A VMM as it introduces itself to the daemon."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmferry.model.memory import MemoryKind, MemoryLayout


@dataclass(frozen=True, slots=True)
class VmmIdentity:
    """What a VMM says of itself in `hello`; `state` as in docs/reference/vmm-protocol.md."""

    vm: str
    pid: int
    platform: str
    vcpus: int
    layout: MemoryLayout
    abilities: frozenset[str]
    state: str
    memory: MemoryKind = field(default_factory=MemoryKind)
    """Counts where it is a destination."""
