"""The systemd unit: accepted by systemd, and leaves pagers alive."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.daemon.processors import LATENCY_FILE

UNIT = Path(__file__).parents[3] / "deploy/systemd/vmferryd.service"


def test_systemd_accepts_it(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/bin/vmferryd", sys.executable))
    found = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    complaints = [line for line in found.stderr.splitlines() if "vmferryd.service" in line]
    assert complaints == []
    broken = tmp_path / "broken.service"
    broken.write_text(copy.read_text().replace("KillMode=process", "KillMode=nonsense"))
    found = subprocess.run([analyze, "verify", "--man=no", str(broken)], capture_output=True, text=True, check=False)
    assert "nonsense" in found.stderr + found.stdout, "systemd-analyze does not check here"


def test_pagers_outlive_the_daemon() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["OOMPolicy"] == "continue"
    assert {"CAP_SYS_PTRACE", "CAP_SYS_NICE", "CAP_KILL"} <= set(service["CapabilityBoundingSet"].split())
    assert "RestrictRealtime" not in service, "pager.real_time would do nothing"
    assert service["ProtectSystem"] == "strict"


def test_the_unit_may_open_the_cpu_latency_device() -> None:
    assert f"DeviceAllow={LATENCY_FILE} rw" in UNIT.read_text().splitlines(), "keep_awake would do nothing"
