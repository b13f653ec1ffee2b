"""CPU time of the machine and of processes."""

from __future__ import annotations

import os

from vmferry_bench.processes import busy_share, machine_cpu, process_cpu_s


def test_the_busy_share_is_of_all_ticks_between_two_readings() -> None:
    assert busy_share((10, 100), (60, 200)) == 0.5
    assert busy_share((10, 100), (10, 100)) == 0.0


def test_the_machine_was_busy_at_some_time_and_idle_at_another() -> None:
    busy, whole = machine_cpu()
    assert 0 < busy < whole


def test_a_process_that_is_gone_has_used_nothing() -> None:
    assert process_cpu_s(os.getpid()) > 0
    assert process_cpu_s(2**22 + 1) == 0.0
