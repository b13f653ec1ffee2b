"""Each condition of readiness, true and false."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from vmferry.daemon import readiness as readiness_module
from vmferry.daemon.config import parse
from vmferry.daemon.readiness import HostReadiness, Listeners, cpus_check, find_program, online_cpus
from vmferry.demo.patience import patient


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
    with socket.socket(socket.AF_UNIX) as vmm, socket.create_server(("127.0.0.1", 0)) as server:
        vmm.bind(str(config.vmm_socket))
        port = server.getsockname()[1]
        readiness = HostReadiness(config, Listeners({"api": port, "peer": port}))
        before = {check.name: check.ok for check in await readiness.checks()}
        assert not before["vmm_socket"], "bound, but it does not listen yet"
        vmm.listen()
        after = {check.name: check.ok for check in await readiness.checks()}
    assert all(ok for name, ok in after.items() if name != "userfaultfd")


async def test_a_port_whose_server_ended_is_a_cause(tmp_path: Path) -> None:
    config = parse({"runtime_dir": str(tmp_path), "state_dir": str(tmp_path)}, "host-a")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    checks = {check.name: check for check in await HostReadiness(config, Listeners({"peer": port})).checks()}
    assert not checks["peer"].ok
    assert f"port {port} does not answer" in checks["peer"].detail


async def test_an_abstract_socket_whose_name_is_not_text_is_no_cause(tmp_path: Path) -> None:
    config = parse({"runtime_dir": str(tmp_path), "state_dir": str(tmp_path)}, "host-a")
    with socket.socket(socket.AF_UNIX) as stranger, socket.socket(socket.AF_UNIX) as vmm:
        stranger.bind(b"\0stranger-\xff\xfe-%d" % os.getpid())
        vmm.bind(str(config.vmm_socket))
        vmm.listen()
        checks = {check.name: check for check in await HostReadiness(config, Listeners()).checks()}
    assert checks["vmm_socket"].ok


async def test_a_check_that_cannot_be_made_is_a_cause_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted() -> frozenset[int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/sys/devices/system/cpu/online")

    monkeypatch.setattr("vmferry.daemon.readiness.online_cpus", exhausted)
    config = parse({"runtime_dir": str(tmp_path), "state_dir": str(tmp_path)}, "host-a")
    checks = {check.name: check for check in await HostReadiness(config, Listeners()).checks()}
    assert not checks["pager_cpus"].ok
    assert "Too many open files" in checks["pager_cpus"].detail


def test_a_program_is_found_by_path_by_name_and_next_to_python(tmp_path: Path) -> None:
    assert find_program("sh") is not None
    assert find_program("/bin/sh") == Path("/bin/sh")
    assert find_program(Path(sys.executable).name) is not None
    assert find_program(str(tmp_path / "no")) is None


def test_cpus_that_are_not_online_are_named() -> None:
    tuning = parse({"pager": {"page_path_cpus": "0-2", "lane_cpus": "1,9"}}, "host-a").pager.tuning
    check = cpus_check(tuning, frozenset({0, 1, 2, 3}))
    assert (check.ok, check.detail) == (False, "pager.lane_cpus names CPUs that are not online: 9")
    assert cpus_check(tuning, frozenset(range(10))).ok
    assert cpus_check(parse({}, "host-a").pager.tuning, frozenset({0})).ok


def test_this_hosts_cpus_are_online() -> None:
    assert online_cpus() >= os.sched_getaffinity(0)


async def test_a_disk_that_hangs_is_a_cause_and_takes_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse({"runtime_dir": str(tmp_path), "state_dir": str(tmp_path)}, "host-a")
    hangs, tries = threading.Event(), []

    def make_directory(path: Path, key: str, mode: int) -> None:
        tries.append(key)
        hangs.wait()

    monkeypatch.setattr(readiness_module, "HOST_S", 0.01)
    monkeypatch.setattr(readiness_module, "make_directory", make_directory)
    readiness = HostReadiness(config, Listeners())
    try:
        for _ in range(3):
            host = next(check for check in await readiness.checks() if check.name == "host")
            assert not host.ok
            assert "hangs" in host.detail
        assert tries == ["state_dir"]
    finally:
        hangs.set()
    monkeypatch.setattr(readiness_module, "HOST_S", patient(20))
    assert "store" in {check.name for check in await readiness.checks()}


def test_the_check_of_the_store_names_the_key_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = readiness_module._writable("store", tmp_path / "file")
    assert (check.name, check.ok) == ("store", False)
    assert "state_dir" in check.detail
