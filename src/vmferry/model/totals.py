"""The counts of all migrations that have ended on this host. They survive the history. Pure.

The store adds a migration in the transaction that ends it, so each counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vmferry.model.latency import added
from vmferry.model.migration import Incoming, Job, Latency, PageProgress, Phase
from vmferry.model.vocabulary import phase_of

DOWNTIME_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
DURATION_BOUNDS_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)
PAGE_KINDS = ("demand", "push", "zero", "poison", "discarded")
COUNTS = ("bytes_received", "faults", "duplicate_faults", "machine_checks")


@dataclass(frozen=True, slots=True)
class Tally:
    """A histogram: cumulative counts by upper bound, count and sum."""

    counts: tuple[int, ...] = ()
    count: int = 0
    sum: float = 0.0

    def plus(self, value: float, bounds: Sequence[float]) -> Tally:
        before = self.counts or (0,) * len(bounds)
        counts = tuple(count + (value <= bound) for count, bound in zip(before, bounds, strict=True))
        return Tally(counts, self.count + 1, self.sum + value)


@dataclass(frozen=True, slots=True)
class Totals:
    """The counts. Keys of `out` and `into` are "PHASE REASON", the reason empty where there is none."""

    out: Mapping[str, int] = field(default_factory=dict)
    into: Mapping[str, int] = field(default_factory=dict)
    downtime: Tally = field(default_factory=Tally)
    prepare: Tally = field(default_factory=Tally)
    total: Tally = field(default_factory=Tally)
    pages: Mapping[str, int] = field(default_factory=dict)
    """Pages that arrived here, by kind, and the names of COUNTS."""
    first_touch: Latency = field(default_factory=Latency)

    def with_job(self, job: Job) -> Totals:
        """Adds a job that has ended."""
        prepare_s = _prepare_s(job)
        return replace(
            self,
            out=_more(self.out, f"{job.phase} {job.reason_code or ''}"),
            downtime=self.downtime.plus(job.downtime_s, DOWNTIME_BOUNDS_S) if job.downtime_s > 0 else self.downtime,
            prepare=self.prepare.plus(prepare_s, DURATION_BOUNDS_S) if prepare_s else self.prepare,
            total=self.total.plus(job.total_s, DURATION_BOUNDS_S) if job.phase is Phase.COMPLETED else self.total,
        )

    def with_incoming(self, incoming: Incoming) -> Totals:
        """Adds an incoming migration that has ended."""
        more = replace(self, into=_more(self.into, f"{phase_of(incoming)} "))
        return more.with_pages(incoming.progress)

    def with_pages(self, progress: PageProgress) -> Totals:
        """Adds pages that arrived here."""
        pages = dict(self.pages)
        for name in (*PAGE_KINDS, *COUNTS):
            pages[name] = pages.get(name, 0) + getattr(progress, name)
        return replace(self, pages=pages, first_touch=added(self.first_touch, progress.first_touch))


def _prepare_s(job: Job) -> float:
    began = next((change.at_us for change in job.course if change.phase is Phase.PREPARING), 0)
    ended = next((change.at_us for change in job.course if change.phase is Phase.SWITCHOVER), 0)
    return max(1, ended - began) / 1e6 if began and ended else 0.0


def _more(counts: Mapping[str, int], key: str) -> dict[str, int]:
    return {**counts, key: counts.get(key, 0) + 1}
