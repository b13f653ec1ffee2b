"""The metrics: figures from the state, and the reference page complete."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.support.scripted.ops import JOB, STATE
from vmferry.model.migration import Phase
from vmferry.ops.metrics import Metrics
from vmferry.ops.state import SecurityView

REFERENCE = Path(__file__).parents[3] / "docs/reference/metrics.md"


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_figures_are_those_of_the_state() -> None:
    found = samples(Metrics("9.9").text(STATE, 0.25))
    assert found[("vmferry_migrations", (("phase", "POSTCOPY"),))] == 1
    assert found[("vmferry_migrations", (("phase", "FAILED"),))] == 0
    assert found[("vmferry_pages_total", (("kind", "push"), ("side", "source")))] == 450
    assert found[("vmferry_pages_total", (("kind", "poison"), ("side", "destination")))] == 10
    assert found[("vmferry_faults_total", (("side", "source"),))] == 120
    assert found[("vmferry_first_touch_seconds", (("quantile", "0.99"), ("side", "source")))] == 0.0042
    assert found[("vmferry_memory_errors", (("origin", "read"),))] == 1
    assert found[("vmferry_machine_checks", (("severity", "AR"),))] == 1
    assert found[("vmferry_machines", (("state", "MIGRATING_OUT"),))] == 1
    assert found[("vmferry_loop_lag_seconds", ())] == 0.25
    assert any(name == "vmferry_build_info" and ("version", "9.9") in labels for name, labels in found)


def test_downtime_buckets_are_cumulative() -> None:
    jobs = tuple(replace(JOB, downtime_s=d) for d in (0.0, 0.004, 0.012, 60.0))
    found = samples(Metrics("1").text(replace(STATE, jobs=jobs), 0.0))
    assert found[("vmferry_downtime_seconds_bucket", (("le", "0.005"),))] == 1
    assert found[("vmferry_downtime_seconds_bucket", (("le", "0.02"),))] == 2
    assert found[("vmferry_downtime_seconds_bucket", (("le", "10.0"),))] == 2
    assert found[("vmferry_downtime_seconds_count", ())] == 3


def test_push_limits_are_those_of_jobs_under_way() -> None:
    jobs = (
        replace(JOB, push_bytes_per_s=0),
        replace(JOB, push_bytes_per_s=5_000_000),
        replace(JOB, phase=Phase.PREPARING, push_bytes_per_s=7_000_000),
        replace(JOB, phase=Phase.COMPLETED, push_bytes_per_s=9_000_000),
    )
    found = samples(Metrics("1").text(replace(STATE, jobs=jobs), 0.0))
    assert found[("vmferry_push_limited_migrations", ())] == 2
    assert found[("vmferry_push_limit_bytes_per_second", ())] == 12_000_000


def test_before_the_first_reading_only_the_process_is_there() -> None:
    found = samples(Metrics("1").text(None, 0.0))
    assert not any(name.startswith("vmferry_pages") for name, _ in found)


def test_reference_lists_exactly_these() -> None:
    secured = replace(STATE, security=SecurityView(certificate_days_left=1.0))
    text = Metrics("1").text(secured, 0.0).decode()
    served = {name for name in re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE) if name.startswith("vmferry_")}
    documented = set(re.findall(r"^\| `(vmferry_\w+)", REFERENCE.read_text(), re.MULTILINE))
    assert documented == served
