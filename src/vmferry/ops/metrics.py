"""Prometheus metrics, made from the state at each request. They outlive the daemon, because the store does.

Label values are outcome enums. No VM, host or migration is a label. docs/reference/metrics.md lists the metrics.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from vmferry.model.memory_error import Origin, Severity
from vmferry.model.migration import TERMINAL, Latency, Outcome, PageProgress, Phase
from vmferry.ops.state import SecurityView, State

DOWNTIME_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
PAGE_KINDS = ("demand", "push", "zero", "poison", "discarded")
SIDES = ("source", "destination")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class StateCollector(Collector):
    """Turns the newest state into metric families."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.state: State | None = None
        self.loop_lag_s = 0.0

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily("vmferry_build", "What runs.")
        build.add_metric([], {"version": self._version, "python": platform.python_version()})
        yield build
        yield GaugeMetricFamily("vmferry_loop_lag_seconds", "Lag of the event loop, last measured.", self.loop_lag_s)
        if self.state is not None:
            yield from _migrations(self.state)
            yield from _pages(self.state)
            yield from _errors(self.state)
            yield from _security(self.state.security)


class Metrics:
    """The metrics registry of one daemon."""

    def __init__(self, version: str) -> None:
        self._registry = CollectorRegistry()
        self._collector = StateCollector(version)
        self._registry.register(self._collector)
        ProcessCollector(registry=self._registry)

    def text(self, state: State | None, loop_lag_s: float) -> bytes:
        self._collector.state = state
        self._collector.loop_lag_s = loop_lag_s
        return generate_latest(self._registry)


def _migrations(state: State) -> Iterable[Metric]:
    phases = Counter(job.phase for job in state.jobs)
    by_phase = GaugeMetricFamily("vmferry_migrations", "Migrations out of this host.", labels=["phase"])
    for phase in Phase:
        by_phase.add_metric([phase], phases[phase])
    yield by_phase
    outcomes = Counter(incoming.outcome for incoming in state.incomings)
    incoming = GaugeMetricFamily("vmferry_incoming_migrations", "Migrations into this host.", labels=["outcome"])
    for outcome in Outcome:
        incoming.add_metric([outcome], outcomes[outcome])
    yield incoming
    machines = Counter(machine.state for machine in state.machines)
    by_state = GaugeMetricFamily("vmferry_machines", "VMs known to this daemon.", labels=["state"])
    for name in sorted(machines):
        by_state.add_metric([name], machines[name])
    yield by_state
    yield from _push_limits(state)
    yield _downtime([job.downtime_s for job in state.jobs if job.downtime_s > 0])


def _push_limits(state: State) -> Iterable[Metric]:
    limits = [job.push_bytes_per_s for job in state.jobs if job.phase not in TERMINAL and job.push_bytes_per_s]
    yield GaugeMetricFamily(
        "vmferry_push_limited_migrations", "Migrations under way out of this host with a push limit.", len(limits)
    )
    yield GaugeMetricFamily(
        "vmferry_push_limit_bytes_per_second",
        "Push limits of the migrations under way out of this host, summed.",
        sum(limits),
    )


def _downtime(downtimes: Sequence[float]) -> Metric:
    buckets = [(str(bound), float(sum(d <= bound for d in downtimes))) for bound in DOWNTIME_BUCKETS_S]
    return HistogramMetricFamily(
        "vmferry_downtime_seconds",
        "Blackout of migrations out of this host: vCPUs stopped to vCPUs running.",
        buckets=[*buckets, ("+Inf", float(len(downtimes)))],
        sum_value=sum(downtimes),
    )


def _sides(state: State) -> dict[str, list[PageProgress]]:
    return {
        "source": [job.progress for job in state.jobs],
        "destination": [incoming.progress for incoming in state.incomings],
    }


def _pages(state: State) -> Iterable[Metric]:
    sides = _sides(state)
    pages = CounterMetricFamily("vmferry_pages", "Pages of moved VMs, by how they came.", labels=["side", "kind"])
    for side in SIDES:
        for kind in PAGE_KINDS:
            pages.add_metric([side, kind], sum(getattr(progress, kind) for progress in sides[side]))
    yield pages
    totals = (
        ("vmferry_received_bytes", "Bytes of page contents received.", "bytes_received"),
        ("vmferry_faults", "Page faults read by destination pagers.", "faults"),
        ("vmferry_duplicate_faults", "Faults on a page that was already asked for.", "duplicate_faults"),
        ("vmferry_machine_check_reports", "Machine checks reported to VMMs.", "machine_checks"),
    )
    for name, words, attribute in totals:
        family = CounterMetricFamily(name, words, labels=["side"])
        for side in SIDES:
            family.add_metric([side], sum(getattr(progress, attribute) for progress in sides[side]))
        yield family
    touch = GaugeMetricFamily(
        "vmferry_first_touch_seconds",
        "First touch on the destination: the slowest of the migrations under way, by quantile.",
        labels=["side", "quantile"],
    )
    for side, latencies in _under_way(state).items():
        for quantile, attribute in (("0.5", "p50_us"), ("0.9", "p90_us"), ("0.99", "p99_us"), ("1", "max_us")):
            slowest = max((getattr(latency, attribute) for latency in latencies), default=0.0)
            touch.add_metric([side, quantile], slowest / 1e6)
    yield touch


def _under_way(state: State) -> dict[str, list[Latency]]:
    return {
        "source": [job.progress.first_touch for job in state.jobs if job.phase not in TERMINAL],
        "destination": [
            incoming.progress.first_touch
            for incoming in state.incomings
            if incoming.outcome is Outcome.RUNNING and not incoming.lost_reason
        ],
    }


def _errors(state: State) -> Iterable[Metric]:
    entries = [entry for ledger in state.ledgers.values() for entry in ledger]
    origins = Counter(entry.origin for entry in entries)
    by_origin = GaugeMetricFamily("vmferry_memory_errors", "Memory errors in the ledgers.", labels=["origin"])
    for origin in Origin:
        by_origin.add_metric([origin], origins[origin])
    yield by_origin
    severities = Counter(entry.severity for entry in entries)
    checks = GaugeMetricFamily(
        "vmferry_machine_checks", "Memory errors that a guest got a machine check for.", labels=["severity"]
    )
    for severity in Severity:
        checks.add_metric([severity], severities[severity])
    yield checks


def _security(view: SecurityView) -> Iterable[Metric]:
    if view.certificate_days_left is not None:
        yield GaugeMetricFamily(
            "vmferry_certificate_days_left",
            "Days until this host's certificate expires; negative: since then.",
            view.certificate_days_left,
        )
    refusals = CounterMetricFamily("vmferry_refusals", "Connections and calls refused.", labels=["port", "cause"])
    for (port, cause), count in sorted(view.refusals.items()):
        refusals.add_metric([port, cause], count)
    yield refusals
