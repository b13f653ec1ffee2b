"""Each condition of readiness, true and false."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from vmferry.daemon.config import parse
from vmferry.daemon.readiness import HostReadiness, Listeners, cpus_check, find_program, online_cpus


async def test_each_cause_is_named(tmp_path: Path) -> None:
    config = parse(
        {
            "runtime_dir": str(tmp_path),
            "state_dir": "/proc/nothing",
            "pager": {"program": "no-such-pager"},
        },
        "host-a",
    )
    checks = {check.name: check for check in await HostReadiness(config, Listeners()).checks()}
    assert list(checks) == ["store", "runtime_dir", "pager", "pager_cpus", "userfaultfd", "vmm_socket", "api", "peer"]
    bad = {name for name, check in checks.items() if not check.ok} - {"userfaultfd"}
    assert bad == {"store", "pager", "vmm_socket", "api", "peer"}
    assert "no-such-pager" in checks["pager"].detail
    assert checks["userfaultfd"].detail


async def test_all_is_well(tmp_path: Path) -> None:
    config = parse(
        {"runtime_dir": str(tmp_path), "state_dir": str(tmp_path), "pager": {"program": sys.executable}}, "host-a"
    )
    with socket.socket(socket.AF_UNIX) as vmm:
        vmm.bind(str(config.vmm_socket))
        readiness = HostReadiness(config, Listeners({"api": 1, "peer": 2}))
        before = {check.name: check.ok for check in await readiness.checks()}
        assert not before["vmm_socket"], "bound, but it does not listen yet"
        vmm.listen()
        after = {check.name: check.ok for check in await readiness.checks()}
    assert all(ok for name, ok in after.items() if name != "userfaultfd")


def test_a_program_is_found_by_path_by_name_and_beside_python(tmp_path: Path) -> None:
    assert find_program("sh") is not None
    assert find_program("/bin/sh") == Path("/bin/sh")
    assert find_program(Path(sys.executable).name) is not None
    assert find_program(str(tmp_path / "no")) is None


def test_cpus_that_are_not_online_are_named() -> None:
    pager = parse({"pager": {"page_path_cpus": "0-2", "lane_cpus": "1,9"}}, "host-a").pager
    check = cpus_check(pager, frozenset({0, 1, 2, 3}))
    assert (check.ok, check.detail) == (False, "pager.lane_cpus names CPUs that are not online: 9")
    assert cpus_check(pager, frozenset(range(10))).ok
    assert cpus_check(parse({}, "host-a").pager, frozenset({0})).ok


def test_this_hosts_cpus_are_online() -> None:
    assert online_cpus() >= os.sched_getaffinity(0)
