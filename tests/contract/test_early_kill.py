"""A pager maps guest memory: a host that signals bad frames early must not end it (prctl(2), PR_MCE_KILL)."""

from __future__ import annotations

from pathlib import Path

from tests.support.contract.destination_rig import Destination
from tests.support.contract.source_rig import source_of

PF_MCE_PROCESS = 1 << 7
"""The process has chosen a policy of its own (linux/sched.h)."""
PF_MCE_EARLY = 1 << 27
FLAGS = 6
"""Of a thread, behind its name in /proc/PID/stat (proc_pid_stat(5))."""


def policies(pid: int) -> dict[str, int]:
    """The two flags of each thread, by name."""
    found = {}
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        name, _, rest = stat.read_text().rpartition(") ")
        found[name.partition("(")[2]] = int(rest.split()[FLAGS]) & (PF_MCE_PROCESS | PF_MCE_EARLY)
    return found


async def test_no_thread_of_a_source_is_signalled_early(pager_program: str, tmp_path: Path) -> None:
    async with source_of(pager_program, "memfd", tmp_path) as source:
        await source.freeze()
        threads = policies(source.pager.pid)
    assert set(threads.values()) == {PF_MCE_PROCESS}, threads


async def test_no_thread_of_a_destination_is_signalled_early(anonymous: Destination) -> None:
    await anonymous.everything()
    threads = policies(anonymous.pager.pid)
    assert len(threads) > 1
    assert set(threads.values()) == {PF_MCE_PROCESS}, threads
