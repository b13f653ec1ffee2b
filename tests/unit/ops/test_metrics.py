"""The metrics: figures from the state, both formats, the linter of Prometheus, and the reference page complete."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from tests.support.scripted.ops import INCOMING, JOB, NOW_US, PROGRESS, STATE, into, out, with_problems
from vmferry.errors import Reason
from vmferry.model.facts import Live, PagerFacts
from vmferry.model.latency import summary
from vmferry.model.migration import Incoming, Job, Outcome, Phase, PhaseChange
from vmferry.model.totals import Totals
from vmferry.ops.metrics import Metrics
from vmferry.ops.rpc_metrics import RpcMetrics
from vmferry.ops.state import State

REFERENCE = Path(__file__).parents[3] / "docs/reference/metrics.md"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def text(state: State | None, metrics: Metrics | None = None) -> str:
    return (metrics or Metrics("9.9")).text(state, 0.25, ready=True)[0].decode()


def samples(state: State | None, metrics: Metrics | None = None) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text(state, metrics))
        for sample in family.samples
    }


def ended(*jobs: Job) -> State:
    return replace(STATE, totals=reduce(Totals.with_job, jobs, Totals()))


def test_figures_are_those_of_the_state() -> None:
    found = samples(STATE)
    assert found[("vmferry_active_migrations", (("direction", "out"), ("phase", "POSTCOPY")))] == 1
    assert found[("vmferry_active_migrations", (("direction", "in"), ("phase", "POSTCOPY_PAUSED")))] == 0
    assert found[("vmferry_memory_errors", (("origin", "read"),))] == 1
    assert found[("vmferry_machine_checks", (("severity", "AR"),))] == 1
    assert found[("vmferry_machines", (("state", "MIGRATING_OUT"),))] == 1
    assert found[("vmferry_machines", (("state", "RUNNING"),))] == 0, "a state without a VM is zero, not absent"
    assert found[("vmferry_loop_lag_seconds", ())] == 0.25
    assert found[("vmferry_ready", ())] == 1
    assert any(name == "vmferry_build_info" and ("version", "9.9") in labels for name, labels in found)


def test_pages_count_where_they_arrive_and_nowhere_else() -> None:
    found = samples(STATE)
    assert found[("vmferry_pages_total", (("kind", "push"),))] == PROGRESS.push, "the source counts none of them"
    assert found[("vmferry_faults_total", ())] == PROGRESS.faults


def test_counters_do_not_fall_when_a_migration_ends_or_is_forgotten() -> None:
    before = samples(STATE)
    done = replace(INCOMING, outcome=Outcome.COMPLETED)
    after = samples(replace(STATE, moving=(), totals=Totals().with_incoming(done)))
    for name in ("vmferry_received_bytes_total", "vmferry_faults_total"):
        assert after[(name, ())] == before[(name, ())]
    key = (("direction", "in"), ("phase", "COMPLETED"), ("reason", ""))
    assert (before[("vmferry_ended_migrations_total", key)], after[("vmferry_ended_migrations_total", key)]) == (0, 1)


def test_a_guest_that_hangs_shows_its_wait() -> None:
    stuck = replace(
        PROGRESS, waiting_faults=2, oldest_fault_since_us=NOW_US - 40_000_000, last_page_us=NOW_US - 41_000_000
    )
    course = (PhaseChange(Phase.POSTCOPY_PAUSED, NOW_US - 39_000_000),)
    record = replace(INCOMING, progress=stuck, paused_reason="reset", course=course)
    pager = PagerFacts("host-a", "destination", 7, alive=True, cpu_s=1.5, memory_bytes=4096)
    found = samples(with_problems(replace(STATE, moving=(into(record, Live(pager=pager)),))))
    assert found[("vmferry_waiting_faults", ())] == 2
    assert found[("vmferry_oldest_fault_age_seconds", ())] == 40
    assert found[("vmferry_last_page_age_seconds", ())] == 41
    paused = (("direction", "in"), ("phase", "POSTCOPY_PAUSED"))
    assert found[("vmferry_phase_age_seconds", paused)] == 39
    assert found[("vmferry_problems", (("weight", "hurt"),))] == 1
    assert found[("vmferry_pagers", (("role", "destination"),))] == 1
    assert found[("vmferry_pager_cpu_seconds_total", (("role", "destination"),))] == 1.5


def test_a_pager_that_died_is_counted_once() -> None:
    metrics = Metrics("1")
    dead = PagerFacts("host-a", "source", 7, alive=False, exit="was killed by SIGKILL", cpu_s=2.0)
    state = replace(STATE, moving=(out(JOB, Live(pager=dead)),))
    for _ in range(2):
        found = samples(state, metrics)
    assert found[("vmferry_pager_deaths_total", (("role", "source"),))] == 1
    assert found[("vmferry_pager_cpu_seconds_total", (("role", "source"),))] == 2.0


def test_downtime_buckets_are_cumulative() -> None:
    found = samples(ended(*(replace(JOB, phase=Phase.COMPLETED, downtime_s=d) for d in (0.0, 0.004, 0.012, 60.0))))
    assert found[("vmferry_downtime_seconds_bucket", (("le", "0.005"),))] == 1
    assert found[("vmferry_downtime_seconds_bucket", (("le", "0.02"),))] == 2
    assert found[("vmferry_downtime_seconds_bucket", (("le", "10.0"),))] == 2
    assert found[("vmferry_downtime_seconds_count", ())] == 3


def test_the_reason_of_an_end_is_counted() -> None:
    found = samples(ended(replace(JOB, phase=Phase.FAILED, reason_code=Reason.VMM_GONE)))
    key = (("direction", "out"), ("phase", "FAILED"), ("reason", "VMM_GONE"))
    assert found[("vmferry_ended_migrations_total", key)] == 1


def test_first_touches_are_a_histogram_of_all_moves() -> None:
    touches = summary((0, 3, 1), 60.0)
    record = Incoming("m2", "db", "b", Outcome.RUNNING, progress=replace(PROGRESS, first_touch=touches))
    found = samples(replace(STATE, moving=(into(record),), totals=Totals(first_touch=touches)))
    assert found[("vmferry_first_touch_seconds_bucket", (("le", "1e-05"),))] == 0
    assert found[("vmferry_first_touch_seconds_bucket", (("le", "2e-05"),))] == 8
    assert found[("vmferry_first_touch_seconds_count", ())] == 8
    assert found[("vmferry_first_touch_seconds_sum", ())] == pytest.approx(120e-6)


def test_push_limits_are_those_of_jobs_under_way() -> None:
    jobs = (
        replace(JOB, push_bytes_per_s=0),
        replace(JOB, push_bytes_per_s=5_000_000),
        replace(JOB, phase=Phase.PREPARING, push_bytes_per_s=7_000_000),
    )
    found = samples(replace(STATE, moving=tuple(map(out, jobs))))
    assert found[("vmferry_push_limited_migrations", ())] == 2
    assert found[("vmferry_push_limit_bytes_per_second", ())] == 12_000_000


def test_before_the_first_reading_only_the_process_is_there() -> None:
    assert not any(name.startswith("vmferry_pages") for name, _ in samples(None))


def test_a_reader_of_openmetrics_gets_it() -> None:
    body, content_type = Metrics("1").text(STATE, 0.0, accept="application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert {family.name for family in open_metrics(body.decode())} >= {"vmferry_pages", "vmferry_downtime_seconds"}


def test_calls_are_counted_by_method_and_code() -> None:
    rpcs = RpcMetrics()
    rpcs.observe("/vmferry.v1.Migrations/GetMigration", "NOT_FOUND", 0.003)
    rpcs.observe("/vmferry.v1.Migrations/WatchMigrations", "CANCELLED", None)
    found = samples(STATE, Metrics("1", rpcs))
    labels = (("code", "NOT_FOUND"), ("method", "GetMigration"), ("service", "Migrations"))
    assert found[("vmferry_rpcs_total", labels)] == 1
    timed = (("method", "GetMigration"), ("service", "Migrations"))
    assert found[("vmferry_rpc_seconds_count", timed)] == 1
    assert not any(
        ("method", "WatchMigrations") in labels for name, labels in found if name.startswith("vmferry_rpc_s")
    )


def everything() -> Metrics:
    rpcs = RpcMetrics()
    rpcs.observe("/vmferry.v1.Migrations/GetMigration", "OK", 0.003)
    return Metrics("1", rpcs)


def test_the_linter_of_prometheus_finds_nothing() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    secured = replace(STATE, security=replace(STATE.security, certificate_days_left=3.0))
    found = subprocess.run(
        [promtool, "check", "metrics"], input=text(secured, everything()), text=True, capture_output=True, check=False
    )
    ours = [line for line in (found.stdout + found.stderr).splitlines() if line.startswith("vmferry_")]
    assert (ours, found.returncode) == ([], 0), found.stdout + found.stderr


def test_reference_lists_exactly_these() -> None:
    shown = text(replace(STATE, security=replace(STATE.security, certificate_days_left=3.0)), everything())
    served = {name for name in re.findall(r"^# TYPE (\S+) ", shown, re.MULTILINE) if name.startswith("vmferry_")}
    served = {name for name in served if not name.endswith("_created")}
    documented = set(re.findall(r"^\| `(vmferry_\w+)", REFERENCE.read_text(), re.MULTILINE))
    assert documented == served
