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
    buckets: tuple[int, ...] = ()
    """Counts between the bounds of `model.latency.BOUNDS_US`, without the zeros at the end."""
    sum_us: float = 0.0


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
    waiting_faults: int = 0
    """Pages that vCPUs wait for now."""
    oldest_wait_us: int = 0
    """The age of the oldest wait when the pager answered. The daemon turns it into `oldest_fault_since_us`."""
    oldest_fault_since_us: int = 0
    last_page_us: int = 0
    rate_bytes_per_s: float = 0.0
    remaining_s: float = 0.0
    """To the last page at the present pace; 0: unknown."""
    recent_first_touch: Latency = field(default_factory=Latency)
    """Of the last 10 s."""

    @property
    def arrived(self) -> int:
        """The pages that no longer need the source."""
        return max(0, self.total - self.absent)


@dataclass(frozen=True, slots=True)
class PhaseChange:
    """The begin of a phase, Unix microseconds."""

    phase: Phase
    at_us: int


COURSE_MOST = 64
"""The most phase changes that are kept of a migration: its first one and the newest."""


def course_with(course: tuple[PhaseChange, ...], phase: Phase, at_us: int) -> tuple[PhaseChange, ...]:
    """The course of a migration that is in `phase` now. An unchanged phase adds nothing."""
    if course and course[-1].phase is phase:
        return course
    longer = (*course, PhaseChange(phase, max(at_us, course[-1].at_us if course else 0)))
    return longer if len(longer) <= COURSE_MOST else (longer[0], *longer[1 - COURSE_MOST :])


@dataclass(frozen=True, slots=True)
class BlackoutPart:
    """One wait of the blackout. Parts overlap: the device state is saved while the store keeps the commit."""

    name: str
    """In words, with the host: "the VMM on a to stop"."""
    duration_s: float


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
    destination_host: str = ""
    """The destination's own name, once it has answered."""
    requested_by: str = ""
    """The caller of CreateMigration, e.g. "10.0.0.7"."""
    course: tuple[PhaseChange, ...] = ()
    blackout: tuple[BlackoutPart, ...] = ()

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
    prepared_for: str = ""
    """The digest of the request that this host was prepared for."""
    course: tuple[PhaseChange, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the migration has ended on this host."""
        return self.outcome in (Outcome.COMPLETED, Outcome.REFUSED) or bool(self.lost_reason)
