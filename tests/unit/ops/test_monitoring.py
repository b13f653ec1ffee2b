"""deploy/prometheus and deploy/grafana: rules that fire, links that hold, and queries of metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALERTS = ROOT / "deploy/prometheus/vmferry-alerts.yml"
NAME = re.compile(r"vmferry_\w+")


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    found = subprocess.run([program, *arguments], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def documented() -> set[str]:
    rows = re.findall(r"^\| `(vmferry_\w+)` \| (\w+)", (ROOT / "docs/reference/metrics.md").read_text(), re.MULTILINE)
    parts = {f"{name}_{part}" for name, kind in rows if kind == "histogram" for part in ("bucket", "sum", "count")}
    return {name for name, kind in rows if kind != "histogram"} | parts


def expressions() -> list[str]:
    """The queries of the dashboard."""
    dashboard = json.loads((ROOT / "deploy/grafana/vmferry.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_rules_fire_when_they_should() -> None:
    promtool("check", "rules", ALERTS.name)
    promtool("test", "rules", "vmferry-alerts.test.yml")


def test_every_alert_has_a_test_and_a_section_of_the_runbook() -> None:
    text = ALERTS.read_text()
    alerts = re.findall(r"alert: (\w+)", text)
    tested = (ALERTS.parent / "vmferry-alerts.test.yml").read_text()
    assert [name for name in alerts if name not in tested] == []
    links = re.findall(r"runbook_url: (\S+)", text)
    assert len(links) == len(alerts) > 10
    runbook = (ROOT / "docs/reference/runbook.md").read_text()
    for link in links:
        path, _, section = link.partition("#")
        assert (ROOT / path).exists()
        assert not section or f"\n## {section.upper()}\n" in runbook


def test_rules_and_dashboard_ask_for_metrics_that_exist() -> None:
    rules = re.findall(r"expr: (.+)", ALERTS.read_text())
    asked = {name for query in (*rules, *expressions()) for name in NAME.findall(query)}
    assert asked - documented() == set()
    assert len(asked) > 20


def test_the_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = tmp_path / "queries.yml"
    records = [
        {"record": f"query:{number}", "expr": query.replace("$instance", ".*")}
        for number, query in enumerate(expressions())
    ]
    rules.write_text(json.dumps({"groups": [{"name": "queries", "rules": records}]}))
    promtool("check", "rules", str(rules))
