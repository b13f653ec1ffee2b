"""The dashboard in a real browser, over a scripted state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.chromium import Findings, watch_dashboard
from tests.support.scripted.ops import STATE, ScriptedReadiness, ScriptedSource
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import Phase
from vmferry.ops.server import OpsServer
from vmferry.units import Gpa


@pytest.fixture
async def source() -> ScriptedSource:
    return ScriptedSource()


@pytest.fixture
async def url(source: ScriptedSource) -> AsyncIterator[str]:
    server = OpsServer(source, ScriptedReadiness(), "1.0")
    port = await server.start("127.0.0.1", 0)
    task = asyncio.create_task(server.run())
    yield f"http://127.0.0.1:{port}/"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop()


@pytest.mark.timeout(180)
async def test_it_shows_the_migration_and_follows_it(
    chromium: str, tmp_path: Path, url: str, source: ScriptedSource
) -> None:
    def moves_on(findings: Findings) -> bool:
        """Changes the state once the page shows the first and is live: what it shows then came by an event."""
        if findings.live == "live" and findings.phases.get("m1") == ["POSTCOPY"]:
            new = LedgerEntry(Gpa(0x5000), Origin.VMM, severity=Severity.ACTION_OPTIONAL, guest_visible=True)
            source.value = replace(STATE, ledgers={"web-1": (*STATE.ledgers["web-1"], new)})
            source.phase(Phase.COMPLETED)
        return "COMPLETED" in findings.phases.get("m1", []) and ("web-1", "0x5000") in findings.errors

    findings = await asyncio.to_thread(watch_dashboard, chromium, tmp_path / "profile", url, moves_on)
    assert findings.vms == {"web-1": ["MIGRATING_OUT"]}
    assert findings.phases == {"m1": ["POSTCOPY", "COMPLETED"]}
    assert findings.outcomes == {"m2": ["POSTCOPY"]}
    assert findings.limits == {"m1": ["push limit 200 MiB/s", ""]}
    assert findings.errors[("web-1", "0x1f000")] == ("read", "AR", "yes", "2", "3")
    assert findings.errors[("web-1", "0x5000")] == ("vmm", "AO", "yes", "0", "1")
    assert (600, 1000) in findings.progress
    assert findings.live == "live"
    assert findings.updates >= 2
    assert findings.problems == []


@pytest.mark.timeout(180)
async def test_the_first_picture_needs_no_script(chromium: str, tmp_path: Path, url: str) -> None:
    findings = await asyncio.to_thread(
        watch_dashboard, chromium, tmp_path / "profile", url, lambda seen: bool(seen.vms), with_script=False
    )
    assert findings.vms == {"web-1": ["MIGRATING_OUT"]}
    assert findings.phases == {"m1": ["POSTCOPY"]}
    assert ("web-1", "0x1f000") in findings.errors
    assert findings.updates == 0
