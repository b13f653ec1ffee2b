"""The one set of facts about a moving VM. API, command line, metrics, log and page show these and no others. Pure.

```
 job, or incoming record ──┐
 pager here, step here   ──┤
 the other host's facts  ──┼─▶ outgoing(…), arriving(…) ─▶ MoveFacts
 events of both hosts    ──┘
```

The two daemons tell each other their `HostFacts` (peer.proto, ExchangeFacts), so both make the same picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from vmferry.errors import Reason
from vmferry.model.migration import TERMINAL, BlackoutPart, Incoming, Job, Latency, PageProgress, Phase, PhaseChange
from vmferry.model.pace import stopped
from vmferry.model.vocabulary import phase_of


class Direction(StrEnum):
    """Where a migration goes, seen from one host."""

    OUT = "OUT"
    IN = "IN"


@dataclass(frozen=True, slots=True)
class Step:
    """A step under way: its words ("the VMM of web-4 to make its memory"), its host, and its deadline."""

    what: str
    host: str
    since_us: int
    until_us: int

    def words(self) -> str:
        """Names the step, the host and the time left to it, without a running clock."""
        return f"waits for {self.what} on {self.host}"


@dataclass(frozen=True, slots=True)
class PagerFacts:
    """A pager process. `cpu_s`: user and system time; `memory_bytes`: memory of its own, without the guest's."""

    host: str
    role: str
    pid: int
    alive: bool
    exit: str = ""
    """How it ended: "was killed by SIGKILL", "ended with status 1"."""
    ended_us: int = 0
    cpu_s: float = 0.0
    memory_bytes: int = 0

    def death(self) -> str:
        """The cause of a pause, in one clause."""
        how = self.exit or "has ended"
        return f"the {self.role}'s pager ({self.host}, pid {self.pid}) {how}"


@dataclass(frozen=True, slots=True)
class Event:
    """A fact of a migration's course, on one host. `number` orders the events of that host."""

    host: str
    number: int
    at_us: int
    kind: str
    words: str = ""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts that one host has of its side of a migration."""

    host: str = ""
    phase: Phase = Phase.QUEUED
    phase_since_us: int = 0
    reason_code: str = ""
    reason: str = ""
    step: Step | None = None
    pager: PagerFacts | None = None
    events: tuple[Event, ...] = ()
    requested_by: str = ""
    at_us: int = 0


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase of the course. `duration_s` of the present one grows."""

    phase: Phase
    since_us: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class MoveFacts:
    """Everything that is known of one migration on this host. Times are Unix microseconds, 0: not yet."""

    migration: str
    vm: str
    direction: Direction
    source_host: str
    destination_host: str
    destination: str
    """The peer address that was asked for; "" on the destination."""
    phase: Phase
    phase_since_us: int
    reason_code: str
    reason: str
    created_us: int
    updated_us: int
    ended_us: int
    total_s: float
    downtime_s: float
    progress: PageProgress
    memory_errors: int
    push_bytes_per_s: int
    requested_by: str
    revision: int
    spans: tuple[PhaseSpan, ...] = ()
    blackout: tuple[BlackoutPart, ...] = ()
    steps: tuple[Step, ...] = ()
    pagers: tuple[PagerFacts, ...] = ()
    events: tuple[Event, ...] = ()

    @property
    def ended(self) -> bool:
        return self.phase in TERMINAL

    @property
    def other_host(self) -> str:
        return (self.destination_host or self.destination) if self.direction is Direction.OUT else self.source_host


@dataclass(frozen=True, slots=True)
class Live:
    """The facts that only memory has: the present step and pager of this host, and the other host's last word."""

    step: Step | None = None
    pager: PagerFacts | None = None
    there: HostFacts | None = None


def outgoing(host: str, job: Job, live: Live, now_us: int, events: Sequence[Event] = ()) -> MoveFacts:
    """The facts of a job on its source."""
    there = live.there or HostFacts()
    ended = job.phase in TERMINAL
    reason_code, reason = explained(job.phase, str(job.reason_code or ""), job.reason, live)
    return MoveFacts(
        migration=job.migration,
        vm=job.vm,
        direction=Direction.OUT,
        source_host=host,
        destination_host=job.destination_host or there.host,
        destination=job.destination,
        phase=job.phase,
        phase_since_us=_since(job.course, job.created_us),
        reason_code=reason_code,
        reason=reason,
        created_us=job.created_us,
        updated_us=job.updated_us,
        ended_us=job.ended_us,
        total_s=job.age_s(now_us),
        downtime_s=job.downtime_s,
        progress=_shown(job.progress, job.phase),
        memory_errors=job.memory_errors,
        push_bytes_per_s=job.push_bytes_per_s,
        requested_by=job.requested_by,
        revision=job.revision,
        spans=spans(job.course, now_us),
        blackout=job.blackout,
        steps=() if ended else _steps(live),
        pagers=() if ended else _pagers(live),
        events=merged(events, there.events),
    )


def arriving(host: str, record: Incoming, live: Live, now_us: int, events: Sequence[Event] = ()) -> MoveFacts:
    """The facts of an incoming migration on its destination."""
    there = live.there or HostFacts()
    phase = phase_of(record)
    if phase is Phase.PREPARING and there.phase in (Phase.SWITCHOVER, Phase.UNDECIDED):
        phase = there.phase
    if phase is Phase.FAILED and there.phase is Phase.CANCELLED:
        phase = Phase.CANCELLED
    ended = phase in TERMINAL
    code = _CODES.get(phase, "")
    reason_code, reason = explained(phase, code, record.lost_reason or record.paused_reason or record.reason, live)
    began = record.course[0].at_us if record.course else record.started_us
    ended_us = record.course[-1].at_us if ended and record.course else 0
    return MoveFacts(
        migration=record.migration,
        vm=record.vm,
        direction=Direction.IN,
        source_host=record.source_host or there.host,
        destination_host=host,
        destination="",
        phase=phase,
        phase_since_us=_since(record.course, began),
        reason_code=reason_code,
        reason=reason,
        created_us=began,
        updated_us=record.course[-1].at_us if record.course else began,
        ended_us=ended_us,
        total_s=max(0, (ended_us or now_us) - began) / 1e6 if began else 0.0,
        downtime_s=0.0,
        progress=_shown(record.progress, phase),
        memory_errors=0,
        push_bytes_per_s=0,
        requested_by=there.requested_by,
        revision=0,
        spans=spans(record.course, now_us),
        steps=() if ended else _steps(live),
        pagers=() if ended else _pagers(live),
        events=merged(events, there.events),
    )


def explained(phase: Phase, code: str, reason: str, live: Live) -> tuple[str, str]:
    """The code and the cause of a pause. A pager that has died explains more than the broken link that it leaves."""
    if phase is not Phase.POSTCOPY_PAUSED:
        return code, reason
    for pager in _pagers(live):
        if not pager.alive:
            return Reason.PAGER_FAILED.value, pager.death()
    return code, reason


def spans(course: Sequence[PhaseChange], now_us: int) -> tuple[PhaseSpan, ...]:
    """Each phase with its duration. The duration of a terminal phase is zero."""
    if not course:
        return ()
    ends = [*(change.at_us for change in course[1:]), now_us]
    return tuple(
        PhaseSpan(
            change.phase,
            change.at_us,
            0.0 if change.phase in TERMINAL else max(0, end - change.at_us) / 1e6,
        )
        for change, end in zip(course, ends, strict=True)
    )


def merged(*lists: Iterable[Event]) -> tuple[Event, ...]:
    """The events of several hosts, each once, in order of time. One host's events keep their own order."""
    found = {(event.host, event.number): event for events in lists for event in events}
    newest: dict[str, int] = {}
    ordered: list[tuple[int, Event]] = []
    for event in sorted(found.values(), key=lambda one: (one.host, one.number)):
        newest[event.host] = max(newest.get(event.host, 0), event.at_us)
        ordered.append((newest[event.host], event))
    return tuple(event for _, event in sorted(ordered, key=lambda pair: pair[0]))


def _shown(progress: PageProgress, phase: Phase) -> PageProgress:
    if phase in TERMINAL:
        return stopped(progress)
    if phase is Phase.POSTCOPY_PAUSED:
        return replace(progress, rate_bytes_per_s=0.0, remaining_s=0.0, recent_first_touch=Latency())
    return progress


def _since(course: Sequence[PhaseChange], otherwise_us: int) -> int:
    return course[-1].at_us if course else otherwise_us


def _steps(live: Live) -> tuple[Step, ...]:
    return tuple(step for step in (live.step, live.there.step if live.there else None) if step is not None)


def _pagers(live: Live) -> tuple[PagerFacts, ...]:
    return tuple(pager for pager in (live.pager, live.there.pager if live.there else None) if pager is not None)


_CODES = {
    Phase.LOST: Reason.VMM_GONE.value,
    Phase.POSTCOPY_PAUSED: Reason.LINK_DOWN.value,
    Phase.FAILED: Reason.MIGRATION_REFUSED.value,
    Phase.CANCELLED: Reason.CANCELLED.value,
}
"""The reason of an incoming migration, as far as its phase tells."""
