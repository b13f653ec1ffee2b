"""doctor: how tries end, and what its findings come to."""

from __future__ import annotations

import errno
import json
import os
import signal
import time

import pytest

from vmferry.cli import main
from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.probe import configuration, host, kvm, memory_failure, userfaultfd
from vmferry.cli.probe.attempt import attempt
from vmferry.cli.probe.checks import run_all
from vmferry.cli.probe.finding import State, missing, ok, warn
from vmferry.cli.verbs import doctor


def test_a_try_that_works_reports_its_findings():
    assert attempt(lambda: "seen") == attempt(lambda: "seen")
    assert (attempt(lambda: "seen").worked, attempt(lambda: "seen").seen) == (True, "seen")


def _refused() -> str:
    raise OSError(errno.EPERM, "uffd: Operation not permitted")


def _dies() -> str:
    os.kill(os.getpid(), signal.SIGBUS)
    return "lives"


def _hangs() -> str:
    time.sleep(3600)
    return "woke"


@pytest.mark.parametrize(
    ("probe", "words"),
    [(_refused, "uffd: Operation not permitted"), (_dies, "died of SIGBUS"), (_hangs, "no answer within 0.3 s")],
)
def test_a_try_that_does_not_work_tells_why_and_harms_nobody(probe, words):
    found = attempt(probe, deadline_s=0.3)
    assert (found.worked, found.seen) == (False, words)


def test_a_check_that_fails_in_an_unforeseen_way_is_a_finding():
    def check():
        raise OSError(errno.EIO, "strange")

    (finding,) = run_all([check])
    assert finding.state is State.WARN
    assert "strange" in finding.seen


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([ok("a", "x"), warn("b", "y", "do")], ExitCode.OK),
        ([ok("a", "x"), missing("b", "y", "do this")], ExitCode.REFUSED),
    ],
)
def test_only_a_missing_need_makes_it_fail(monkeypatch, capsys, findings, code):
    monkeypatch.setattr(doctor, "run_all", lambda: findings)
    assert main(["doctor", "--json"]) == code
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [finding.plain() for finding in findings]
    assert main(["doctor"]) == code
    assert findings[1].todo in capsys.readouterr().out


@pytest.mark.parametrize(
    "check",
    [
        userfaultfd.check_userfaultfd,
        userfaultfd.check_poison,
        userfaultfd.check_poison_signal,
        userfaultfd.check_minor,
        userfaultfd.check_dirty_tracking,
        kvm.check_kvm,
        kvm.check_machine_checks,
        kvm.check_memory_fault_exit,
        memory_failure.check_memory_failure,
        memory_failure.check_hwpoison,
        memory_failure.check_soft_offline,
        host.check_huge_pages,
        host.check_descriptors,
        host.check_locked_memory,
        host.check_process_memory,
        host.check_network_namespace,
        host.check_memory,
        host.check_kernel,
    ],
)
def test_every_check_comes_to_a_finding_with_advice_unless_all_is_well(check):
    finding = check()
    assert finding.seen
    assert bool(finding.todo) == (finding.state is not State.OK)


def test_without_the_device_kvm_is_a_warning_with_a_way_out(monkeypatch):
    monkeypatch.setattr(kvm, "KVM_DEVICE", "/nonexistent/kvm")
    finding = kvm.check_kvm()
    assert finding.state is State.WARN
    assert "--accel process" in finding.todo


@pytest.mark.parametrize(
    ("sysctls", "state", "words"),
    [
        ({}, State.WARN, "no CONFIG_MEMORY_FAILURE"),
        ({"memory_failure_recovery": 1, "memory_failure_early_kill": 0}, State.OK, "at a touch, or at once if it asks"),
        ({"memory_failure_recovery": 1, "memory_failure_early_kill": 1}, State.OK, "hears of a bad frame at once"),
        ({"memory_failure_recovery": 0, "memory_failure_early_kill": 0}, State.WARN, "memory_failure_recovery 0"),
    ],
)
def test_it_tells_when_processes_hear_of_bad_frames(monkeypatch, tmp_path, sysctls, state, words):
    for name, value in sysctls.items():
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(memory_failure, "SYSCTLS", tmp_path)
    finding = memory_failure.check_memory_failure()
    assert finding.state is state
    assert words in finding.seen


@pytest.mark.parametrize(
    ("files", "state", "words"),
    [
        ({}, State.WARN, "is not there"),
        ({"soft_offline_page": ""}, State.OK, "is replaced"),
        ({"soft_offline_page": "", "enable_soft_offline": "1"}, State.OK, "is replaced"),
        ({"soft_offline_page": "", "enable_soft_offline": "0"}, State.WARN, "vm.enable_soft_offline 0"),
    ],
)
def test_it_tells_whether_weak_frames_are_replaced(monkeypatch, tmp_path, files, state, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory_failure, "SOFT_OFFLINE", tmp_path / "soft_offline_page")
    monkeypatch.setattr(memory_failure, "SYSCTLS", tmp_path)
    finding = memory_failure.check_soft_offline()
    assert finding.state is state
    assert words in finding.seen


def test_the_signal_of_a_touch_is_the_kernels(uffd_poison):
    """As tests/kernel has it: with CONFIG_MEMORY_FAILURE another than without."""
    recovers = memory_failure.SYSCTLS.joinpath("memory_failure_recovery").exists()
    words = "BUS_MCEERR_AR, si_addr_lsb 12" if recovers else "BUS_ADRERR, si_addr_lsb 0"
    finding = userfaultfd.check_poison_signal()
    assert (finding.state, finding.seen) == (State.OK, f"a thread that touches poison gets SIGBUS {words}")


def test_without_userfaultfd_migration_is_impossible(monkeypatch):
    def refuse(_flags):
        raise OSError(errno.EPERM, "userfaultfd: Operation not permitted")

    monkeypatch.setattr(userfaultfd.libc, "userfaultfd", refuse)
    monkeypatch.setattr(userfaultfd, "USERFAULTFD_DEVICE", "/nonexistent/userfaultfd")
    for check in (userfaultfd.check_userfaultfd, userfaultfd.check_poison):
        assert check().state is State.MISSING
    for check in (userfaultfd.check_minor, userfaultfd.check_dirty_tracking):
        assert check().state is State.WARN


def test_a_missing_pager_is_told_with_the_places(monkeypatch):
    monkeypatch.setenv("VMFERRY_PROGRAMS", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    finding = host.check_program("vmferry-no-such-program", True, "install it")
    assert finding.state is State.MISSING
    assert "/nonexistent" in finding.seen


def test_the_configuration_of_the_unit_is_checked(tmp_path):
    """A runtime_dir without room for unix sockets shows here, not at the first migration."""
    path = tmp_path / "vmferryd.toml"
    assert configuration.check_configuration(path).state is State.OK
    path.write_text('runtime_dir = "/run/vmferry"\n')
    assert configuration.check_configuration(path) == ok("configuration", f"{path} is good")
    path.write_text(f'runtime_dir = "/{"x" * 90}"\n')
    found = configuration.check_configuration(path)
    assert found.state is State.MISSING
    assert "runtime_dir: is " in found.seen
    assert "at most 78 bytes" in found.seen
