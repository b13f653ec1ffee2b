"""The values a migration is made of: frozen, without I/O, shared by the machine, the ports and the store."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vmferry.errors import Reason


class Phase(StrEnum):
    """Where a migration stands, on the source. See `source/state_machine.py` for the edges."""

    QUEUED = "QUEUED"
    PREPARING = "PREPARING"
    SWITCHOVER = "SWITCHOVER"
    UNDECIDED = "UNDECIDED"
    POSTCOPY = "POSTCOPY"
    POSTCOPY_PAUSED = "POSTCOPY_PAUSED"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"
    LOST = "LOST"


TERMINAL: frozenset[Phase] = frozenset({Phase.COMPLETED, Phase.CANCELLED, Phase.FAILED, Phase.LOST})


class Outcome(StrEnum):
    """What the destination's journal says of a migration."""

    UNKNOWN = "UNKNOWN"
    PREPARED = "PREPARED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True)
class Latency:
    """First touch on the destination, microseconds."""

    count: int = 0
    p50_us: float = 0.0
    p90_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0


@dataclass(frozen=True, slots=True)
class PageProgress:
    """Where the pages of a moving VM stand, on its destination (`PageProgress` in common.proto)."""

    total: int = 0
    absent: int = 0
    demand: int = 0
    push: int = 0
    zero: int = 0
    poison: int = 0
    discarded: int = 0
    bytes_received: int = 0
    faults: int = 0
    duplicate_faults: int = 0
    machine_checks: int = 0
    first_touch: Latency = field(default_factory=Latency)


@dataclass(frozen=True, slots=True)
class Job:
    """A migration as the source's daemon keeps it. Times are Unix microseconds; 0: not yet."""

    migration: str
    vm: str
    destination: str
    phase: Phase = Phase.QUEUED
    reason_code: Reason | None = None
    reason: str = ""
    revision: int = 0
    created_us: int = 0
    updated_us: int = 0
    ended_us: int = 0
    stopped_us: int = 0
    started_us: int = 0
    downtime_s: float = 0.0
    progress: PageProgress = field(default_factory=PageProgress)
    memory_errors: int = 0
    push_bytes_per_s: int = 0
    """Bytes a second that the background push may send; 0: no limit. Demand is never held back."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A migration as the destination's daemon keeps it."""

    migration: str
    vm: str
    source_host: str
    outcome: Outcome
    reason: str = ""
    progress: PageProgress = field(default_factory=PageProgress)
    lost_reason: str = ""
    """Set once the VM's process died here after it ran: the source's job becomes LOST."""
    paused_reason: str = ""
    started_us: int = 0
    guarded_pages: int = 0

    @property
    def ended(self) -> bool:
        """Nothing more comes of it."""
        return self.outcome in (Outcome.COMPLETED, Outcome.REFUSED) or bool(self.lost_reason)
