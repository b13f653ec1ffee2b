"""Prometheus metrics. Counts of ended migrations come from the store, so they survive the daemon and the history.

Label values are fixed words. No VM, host or migration is a label. Pages count on the host that receives them, and
migrations by direction, so sums over a fleet count nothing twice. docs/reference/metrics.md lists the metrics.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vmferry.model.facts import Direction, MoveFacts, PagerFacts
from vmferry.model.latency import BOUNDS_US
from vmferry.model.memory_error import Origin, Severity
from vmferry.model.migration import TERMINAL, Latency, Phase
from vmferry.model.totals import DOWNTIME_BOUNDS_S, DURATION_BOUNDS_S, PAGE_KINDS, Tally, Totals
from vmferry.model.vocabulary import Weight
from vmferry.ops.rpc_metrics import RpcMetrics
from vmferry.ops.state import SecurityView, State

MACHINE_STATES = ("RUNNING", "INCOMING", "MIGRATING_OUT", "MIGRATING_IN", "MOVED", "DISCONNECTED")
ROLES = ("source", "destination")
TOUCH_BOUNDS_US = tuple(bound for bound in BOUNDS_US if f"{bound:.0f}".rstrip("0") in ("1", "2", "5"))
"""Three bounds a decade, of those that the pager counts by."""


class PagerUse:
    """CPU time and deaths of this host's pagers, summed over processes that come and go."""

    def __init__(self) -> None:
        self.cpu_s = dict.fromkeys(ROLES, 0.0)
        self.deaths = dict.fromkeys(ROLES, 0)
        self._seen: dict[tuple[str, int], PagerFacts] = {}

    def observe(self, pagers: Sequence[PagerFacts]) -> None:
        for pager in pagers:
            if pager.role not in self.cpu_s:
                continue
            key = (pager.role, pager.pid)
            before = self._seen.get(key)
            self.cpu_s[pager.role] += max(0.0, pager.cpu_s - (before.cpu_s if before else 0.0))
            self.deaths[pager.role] += not pager.alive and (before is None or before.alive)
            self._seen[key] = pager
        alive = {(pager.role, pager.pid) for pager in pagers}
        self._seen = {key: pager for key, pager in self._seen.items() if key in alive}


class StateCollector(Collector):
    """Turns the newest state into metric families."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.use = PagerUse()
        self.state: State | None = None
        self.loop_lag_s = 0.0
        self.ready = False

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily("vmferry_build", "The running build.")
        build.add_metric([], {"version": self._version, "python": platform.python_version()})
        yield build
        yield GaugeMetricFamily("vmferry_loop_lag_seconds", "Lag of the event loop, last measured.", self.loop_lag_s)
        yield GaugeMetricFamily("vmferry_ready", "1 if every condition of /readyz holds.", float(self.ready))
        if self.state is None:
            return
        yield from _host(self.state)
        yield from _moving(self.state)
        yield from _ended(self.state.totals)
        yield from _pages(self.state)
        yield from _pagers(self.state, self.use)
        yield from _errors(self.state)
        yield from _security(self.state.security)


class Metrics:
    """The metrics registry of one daemon."""

    def __init__(self, version: str, rpcs: RpcMetrics | None = None) -> None:
        self._registry = CollectorRegistry()
        self._collector = StateCollector(version)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)
        if rpcs is not None:
            rpcs.register(self._registry)

    def text(self, state: State | None, loop_lag_s: float, ready: bool = False, accept: str = "") -> tuple[bytes, str]:
        """The metrics and their content type: OpenMetrics if the reader accepts it, else Prometheus text."""
        self._collector.state = state
        self._collector.loop_lag_s = loop_lag_s
        self._collector.ready = ready
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _host(state: State) -> Iterable[Metric]:
    machines = Counter(machine.state for machine in state.machines)
    yield _by("vmferry_machines", "VMs known to this daemon.", "state", {one: machines[one] for one in MACHINE_STATES})
    connected = sum(machine.vmm_pid > 0 for machine in state.machines)
    yield GaugeMetricFamily("vmferry_connected_vmms", "VMMs connected to this daemon.", connected)
    weights = Counter(problem.weight for problem in state.problems)
    yield _by("vmferry_problems", "Problems now.", "weight", {one.value: weights[one] for one in Weight})
    yield GaugeMetricFamily("vmferry_history_migrations", "Ended migrations that are kept.", state.ended_count)


def _moving(state: State) -> Iterable[Metric]:
    active = GaugeMetricFamily("vmferry_active_migrations", "Migrations under way.", labels=["direction", "phase"])
    age = GaugeMetricFamily(
        "vmferry_phase_age_seconds",
        "Time in the present phase: the longest of the migrations under way.",
        labels=["direction", "phase"],
    )
    for direction in Direction:
        for phase in Phase:
            if phase in TERMINAL:
                continue
            found = [one for one in state.moving if one.direction is direction and one.phase is phase]
            labels = [direction.lower(), phase]
            active.add_metric(labels, len(found))
            age.add_metric(labels, max((_age_s(state, one.phase_since_us) for one in found), default=0.0))
    yield active
    yield age
    yield from _arriving(state, [one for one in state.moving if one.direction is Direction.IN])
    yield from _push_limits([one for one in state.moving if one.direction is Direction.OUT])


def _arriving(state: State, moves: Sequence[MoveFacts]) -> Iterable[Metric]:
    pages = [one.progress for one in moves]
    oldest = max((_age_s(state, one.oldest_fault_since_us) for one in pages), default=0.0)
    last = max((_age_s(state, one.last_page_us) for one in pages if one.absent), default=0.0)
    yield GaugeMetricFamily("vmferry_absent_pages", "Pages still to arrive here.", sum(one.absent for one in pages))
    yield GaugeMetricFamily(
        "vmferry_receive_bytes_per_second",
        "Present rate of arriving pages.",
        sum(one.rate_bytes_per_s for one in pages),
    )
    yield GaugeMetricFamily(
        "vmferry_waiting_faults", "Pages that vCPUs here wait for now.", sum(one.waiting_faults for one in pages)
    )
    yield GaugeMetricFamily("vmferry_oldest_fault_age_seconds", "The longest present wait of a vCPU here.", oldest)
    yield GaugeMetricFamily("vmferry_last_page_age_seconds", "The longest time without a page of a VM here.", last)


def _push_limits(moves: Sequence[MoveFacts]) -> Iterable[Metric]:
    limits = [one.push_bytes_per_s for one in moves if one.push_bytes_per_s]
    yield GaugeMetricFamily(
        "vmferry_push_limited_migrations", "Migrations under way out of this host with a push limit.", len(limits)
    )
    yield GaugeMetricFamily(
        "vmferry_push_limit_bytes_per_second",
        "Push limits of the migrations under way out of this host, summed.",
        sum(limits),
    )
    silent = sum(one.reason_code == "DESTINATION_UNREACHABLE" for one in moves)
    yield GaugeMetricFamily(
        "vmferry_unreachable_destinations", "Migrations out of this host whose destination does not answer.", silent
    )


def _ended(totals: Totals) -> Iterable[Metric]:
    ended = CounterMetricFamily(
        "vmferry_ended_migrations", "Migrations that have ended.", labels=["direction", "phase", "reason"]
    )
    for direction, counts in ((Direction.OUT, totals.out), (Direction.IN, totals.into)):
        shown = {f"{phase} ": 0 for phase in sorted(TERMINAL)} | dict(counts)
        for key, count in sorted(shown.items()):
            phase, _, reason = key.partition(" ")
            ended.add_metric([direction.lower(), phase, reason], count)
    yield ended
    yield _histogram(
        "vmferry_downtime_seconds",
        "Blackout of migrations out of this host: vCPUs stopped to vCPUs running.",
        totals.downtime,
        DOWNTIME_BOUNDS_S,
    )
    yield _histogram(
        "vmferry_prepare_seconds", "Preparation of migrations out of this host.", totals.prepare, DURATION_BOUNDS_S
    )
    yield _histogram(
        "vmferry_migration_seconds",
        "Completed migrations out of this host, from creation to end.",
        totals.total,
        DURATION_BOUNDS_S,
    )


def _pages(state: State) -> Iterable[Metric]:
    arriving = [one.progress for one in state.moving if one.direction is Direction.IN]
    totals = reduce(Totals.with_pages, arriving, state.totals)
    pages = CounterMetricFamily("vmferry_pages", "Pages that arrived here, by how they came.", labels=["kind"])
    for kind in PAGE_KINDS:
        pages.add_metric([kind], totals.pages.get(kind, 0))
    yield pages
    counters = (
        ("vmferry_received_bytes", "Bytes of page contents received.", "bytes_received"),
        ("vmferry_faults", "Page faults read by destination pagers here.", "faults"),
        ("vmferry_duplicate_faults", "Faults on a page that was already requested.", "duplicate_faults"),
        ("vmferry_machine_check_reports", "Machine checks reported to VMMs here.", "machine_checks"),
    )
    for name, words, key in counters:
        yield CounterMetricFamily(name, words, totals.pages.get(key, 0))
    yield _touches(totals.first_touch)


def _touches(latency: Latency) -> Metric:
    buckets = [
        (str(bound / 1e6), float(sum(latency.buckets[: BOUNDS_US.index(bound) + 1]))) for bound in TOUCH_BOUNDS_US
    ]
    return HistogramMetricFamily(
        "vmferry_first_touch_seconds",
        "First touch on this destination: fault read to page installed.",
        buckets=[*buckets, ("+Inf", float(latency.count))],
        sum_value=latency.sum_us / 1e6,
    )


def _pagers(state: State, use: PagerUse) -> Iterable[Metric]:
    here = [pager for one in state.moving for pager in one.pagers if pager.host == state.host]
    use.observe(here)
    alive = Counter(pager.role for pager in here if pager.alive)
    yield _by("vmferry_pagers", "Living pagers of migrations under way.", "role", {one: alive[one] for one in ROLES})
    memory = {one: sum(p.memory_bytes for p in here if p.role == one and p.alive) for one in ROLES}
    yield _by("vmferry_pager_memory_bytes", "Memory of the pagers without the guests'.", "role", memory)
    cpu = CounterMetricFamily("vmferry_pager_cpu_seconds", "CPU time of pagers.", labels=["role"])
    deaths = CounterMetricFamily("vmferry_pager_deaths", "Pagers that ended by themselves.", labels=["role"])
    for role in ROLES:
        cpu.add_metric([role], use.cpu_s[role])
        deaths.add_metric([role], use.deaths[role])
    yield cpu
    yield deaths


def _errors(state: State) -> Iterable[Metric]:
    entries = [entry for ledger in state.ledgers.values() for entry in ledger]
    origins = Counter(entry.origin for entry in entries)
    yield _by(
        "vmferry_memory_errors",
        "Memory errors in the ledgers of the VMs here.",
        "origin",
        {one.value: origins[one] for one in Origin},
    )
    severities = Counter(entry.severity for entry in entries)
    yield _by(
        "vmferry_machine_checks",
        "Memory errors that a guest here got a machine check for.",
        "severity",
        {one.value: severities[one] for one in Severity},
    )


def _security(view: SecurityView) -> Iterable[Metric]:
    if view.certificate_days_left is not None:
        yield GaugeMetricFamily(
            "vmferry_certificate_left_seconds",
            "Time until this host's certificate expires; negative: since then.",
            view.certificate_days_left * 86400.0,
        )
    refusals = CounterMetricFamily("vmferry_refusals", "Connections and calls refused.", labels=["port", "cause"])
    for (port, cause), count in sorted(view.refusals.items()):
        refusals.add_metric([port, cause], count)
    yield refusals


def _by(name: str, words: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=[label])
    for value, figure in values.items():
        family.add_metric([value], figure)
    return family


def _histogram(name: str, words: str, tally: Tally, bounds: Sequence[float]) -> Metric:
    counts = tally.counts or (0,) * len(bounds)
    buckets = [(str(bound), float(count)) for bound, count in zip(bounds, counts, strict=True)]
    return HistogramMetricFamily(name, words, buckets=[*buckets, ("+Inf", float(tally.count))], sum_value=tally.sum)


def _age_s(state: State, since_us: int) -> float:
    return max(0, state.at_us - since_us) / 1e6 if since_us else 0.0
