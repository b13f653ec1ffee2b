"""The fakes do what tests rely on: planned faults, hangs, death, and time."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.testing.clock import ManualClock
from vmferry.testing.script import Script
from vmferry.testing.vmm import FakeVmm, FakeVmms, identity


async def test_a_fault_before_and_after_the_effect() -> None:
    script, done = Script(), list[str]()
    script.fail_at("step", OSError("before"))
    with pytest.raises(OSError, match="before"):
        await script.do("step", lambda: done.append("effect"))
    assert done == []
    script.fail_at("step", OSError("after"), after=True)
    with pytest.raises(OSError, match="after"):
        await script.do("step", lambda: done.append("effect"))
    await script.do("step", lambda: done.append("again"))
    assert done == ["effect", "again"]
    assert script.transcript == ["step", "step"]


async def test_a_killed_host_does_nothing_more() -> None:
    script, done = Script("a"), list[str]()
    script.hang_at("step")
    task = asyncio.create_task(script.do("step", lambda: done.append("effect")))
    await script.hung.wait()
    script.kill()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(asyncio.CancelledError):
        await script.do("other", lambda: done.append("other"))
    assert done == []


async def test_a_vmm_refuses_commands_that_its_state_forbids() -> None:
    vmm = FakeVmm(identity("web"), Script())
    with pytest.raises(VmferryError) as caught:
        await vmm.save_state()
    assert caught.value.reason is Reason.VMM_REFUSED
    await vmm.stop()
    await vmm.stop()
    assert await vmm.save_state() == b"state of web"
    await vmm.abandon()
    assert await vmm.gone() == "abandoned"
    with pytest.raises(VmferryError) as caught:
        await vmm.resume()
    assert caught.value.reason is Reason.VMM_GONE


def test_vmms_find_the_one_that_runs_before_the_one_that_stands() -> None:
    vmms, script = FakeVmms(), Script()
    stopped = vmms.add(FakeVmm(identity("web", "stopped", 1), script))
    assert vmms.running("web") is stopped
    running = vmms.add(FakeVmm(identity("web", "running", 2), script))
    assert vmms.running("web") is running
    assert vmms.incoming("web") is None
    running.die()
    assert vmms.running("web") is stopped


async def test_the_clock_moves_when_told() -> None:
    clock = ManualClock(by_itself=False)
    sleeper = asyncio.create_task(clock.sleep(2))
    await asyncio.sleep(0)
    clock.advance(1)
    await asyncio.sleep(0)
    assert not sleeper.done()
    clock.advance(1)
    await sleeper
    assert clock.monotonic_s() == 2
