"""All checks, in the order of their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmferry.cli.probe import configuration, host, kvm, memory_failure, userfaultfd
from vmferry.cli.probe.finding import Finding, warn

REINSTALL = "Install the wheel of vmferry (`make setup`), which carries it."

CHECKS: Sequence[Callable[[], Finding]] = (
    host.check_kernel,
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
    configuration.check_configuration,
    lambda: host.check_program("vmferryd", True, REINSTALL),
    lambda: host.check_program("vmferry-pager", True, REINSTALL),
    lambda: host.check_program("vmferry-refvm", False, REINSTALL + " Only the demo needs it."),
)


def run_all(checks: Sequence[Callable[[], Finding]] = CHECKS) -> list[Finding]:
    """Runs every check. An unforeseen failure of a check is a finding too."""
    return [_run(check) for check in checks]


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (OSError, ValueError) as error:
        return warn(getattr(check, "__name__", "check"), f"could not be checked: {error}", "Please report this.")
