"""A migration as both daemons keep it: job, incoming migration, phase, outcome and progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vmferry.errors import Reason


class Phase(StrEnum):
    """The phase of a migration on its source. See `source/state_machine.py` for the edges."""

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
    """The outcome of a migration in the destination's journal."""

    UNKNOWN = "UNKNOWN"
    PREPARED = "PREPARED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True)
class Latency:
    """First-touch latency on the destination, microseconds."""

    count: int = 0
    p50_us: float = 0.0
    p90_us: float = 0.0
    p99_us: float = 0.0
    max_us: float = 0.0


@dataclass(frozen=True, slots=True)
class PageProgress:
    """The pages of a moving VM on its destination, counted by state (`PageProgress` in common.proto)."""

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
    """A migration on its source. Times are Unix microseconds; 0: not yet."""

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
    total_s: float = 0.0
    """From its creation to its end, by the host's monotonic clock; 0: it has not ended."""
    downtime_s: float = 0.0
    progress: PageProgress = field(default_factory=PageProgress)
    memory_errors: int = 0
    push_bytes_per_s: int = 0
    """Bytes a second that the background push may send; 0: no limit. Demand is never held back."""
    nonce: str = ""
    """The job's random name, 32 hexadecimal digits. A migration id is unique on its source only."""

    def age_s(self, now_us: int) -> float:
        """Seconds since its creation, or until its end."""
        return self.total_s or max(0, now_us - self.created_us) / 1e6


@dataclass(frozen=True, slots=True)
class Incoming:
    """A migration on its destination."""

    migration: str
    vm: str
    source_host: str
    outcome: Outcome
    reason: str = ""
    progress: PageProgress = field(default_factory=PageProgress)
    lost_reason: str = ""
    """Set when the VM's process died here after it ran. The source's job then becomes LOST."""
    paused_reason: str = ""
    started_us: int = 0
    guarded_pages: int = 0
    job: str = ""
    """The nonce of the source's job. No other job may use the migration's id on this host."""

    @property
    def ended(self) -> bool:
        """Whether the migration has ended on this host."""
        return self.outcome in (Outcome.COMPLETED, Outcome.REFUSED) or bool(self.lost_reason)
