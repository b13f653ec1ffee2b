"""How a destination's threads stand against all others while there is a push."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from tests.support.contract.destination_rig import Destination
from tests.support.contract.page_source import expected
from tests.support.contract.vmm_child import PATIENCE_S

JUDGED_AFTER_S = 0.06
"""A push is judged when it has been watched for 50 ms."""
IN_VAIN = "this process may have no real-time threads (CAP_SYS_NICE, or RLIMIT_RTPRIO)"


@pytest.fixture(scope="session")
def real_time_threads() -> None:
    child = os.fork()
    if child == 0:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        pytest.skip(IN_VAIN)


def page_path(destination: Destination) -> int:
    """To be asked while that thread starts no other, which has its name at first."""
    (thread,) = (
        int(comm.parent.name)
        for comm in Path(f"/proc/{destination.pager.pid}/task").glob("*/comm")
        if comm.read_text() == "page-path\n"
    )
    return thread


def is_real_time(thread: int) -> bool:
    return os.sched_getscheduler(thread) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


async def until(thread: int, real_time: bool) -> None:
    """Asks no pager: to answer would wake the thread."""
    deadline = time.monotonic() + PATIENCE_S
    while is_real_time(thread) is not real_time:
        assert time.monotonic() < deadline, real_time
        await asyncio.sleep(0.01)


async def test_the_fault_thread_is_realtime_only_during_a_heavy_push(
    destination: Destination, real_time_threads: None
) -> None:
    """A push of which nothing comes keeps no core busy: the page path looks out for its next event instead."""
    source, vmm = destination.source, destination.vmm
    await destination.attach()
    await destination.connect()
    thread = page_path(destination)
    assert not is_real_time(thread)
    source.may_push.clear()
    await destination.push(1)
    await until(thread, True)
    await asyncio.sleep(JUDGED_AFTER_S)
    assert await vmm.touch(0) == expected(0)
    await until(thread, False)
    assert await vmm.touch(1) == expected(1)
    source.may_push.set()
    await destination.event("all_present")
    assert not is_real_time(thread)
