"""A QEMU or a monitor that fails before the point of no return leaves the guest running on its source."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.qemu.test_reset import that_can_boot_again
from tests.support.qemu import Hosts, Qemu, Vm, make_image, memory_options, monitors
from tests.support.qmp_proxy import Mischief, QmpProxy, proxy_of
from tests.support.scenario.harness import ended, unique
from vmferry.client.refusal import ApiError
from vmferry.demo.patience import patient
from vmferry.demo.qemu.image import Image
from vmferry.demo.stage import until
from vmferry.v1 import machines_pb2
from vmferry.v1 import migrations_pb2 as mg
from vmferry.vmm.qemu.facts import TELLS_ADDRESSES
from vmferry.vmm.qemu.mark import parse_mark

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

MACHINE = "pc-i440fx-7.2"
NUMBERS = itertools.count(1)
TRIES, LATE = 3, "was stopped for"
"""The words of a move that exceeded its limit of the blackout."""
FAILED = (mg.PHASE_FAILED, mg.PHASE_CANCELLED)


@dataclass
class Attempt:
    """One move: the source, and a QEMU that waits for it, each behind a monitor of the test's."""

    source: Vm
    waiting: Vm
    at_source: QmpProxy
    at_waiting: QmpProxy


@dataclass
class Bench:
    """A guest on its source, which outlives each attempt to move it."""

    hosts: Hosts
    qemu: Qemu
    image: Image
    memory: list[str]
    source: Vm
    proxy: QmpProxy
    attempts: int = 0

    @property
    def save(self) -> str:
        """The command that takes the device state."""
        return "xen-save-devices-state" if self.qemu.version >= TELLS_ADDRESSES else "migrate"

    @asynccontextmanager
    async def attempt(self, *options: str) -> AsyncIterator[Attempt]:
        """A new QEMU waits."""
        vm, pair = self.source.name, self.hosts.pair
        words = ("-S", "-incoming", "defer", *options)
        waiting = await self.hosts.start(pair.away, self.qemu, vm, self.memory, self.image, *words, kind="hidden")
        try:
            async with proxy_of(waiting, monitors(pair.away) / f"{vm}-b.qmp") as proxy:
                await self.hosts.knows(pair.away, vm, machines_pb2.MACHINE_STATE_INCOMING)
                yield Attempt(self.source, waiting, self.proxy, proxy)
        finally:
            await waiting.process.kill()

        async def forgotten() -> bool:
            try:
                await pair.away_api.machine(vm)
            except ApiError:
                return True
            return False

        await until("the waiting QEMU to be gone", forgotten, patient(60.0))

    async def move(self) -> mg.Migration:
        self.attempts += 1
        name, pair = f"{self.source.name}-{self.attempts}", self.hosts.pair
        await pair.home_api.create(name, self.source.name, str(pair.away.place.peer))
        return await ended(pair.home_api, name, patient(120.0))

    async def moves(self, act: Callable[[], Awaitable[None]] | None = None, *options: str) -> None:
        """Moves the guest at last. On a machine that is busy a blackout may exceed its limit."""
        for _ in range(TRIES):
            async with self.attempt(*options) as attempt:
                if act is not None:
                    self.proxy.at["stop"] = act
                last = await self.move()
                if last.phase == mg.PHASE_COMPLETED:
                    report = await attempt.waiting.goes_on(self.image)
                    assert report["wrong_bytes"] == 0 and not report["fatal"], report
                    return
                assert LATE in last.reason, last
        pytest.fail("each blackout exceeded its limit")

    async def runs_on(self) -> None:
        """As if nothing had been: it runs and verifies, and nothing of the attempt is left in QEMU."""
        assert await self.source.status() == "running"
        report = await self.source.goes_on(self.image)
        assert report["wrong_bytes"] == 0 and not report["fatal"], report

        async def clean() -> bool:
            sets = await self.source.ask("query-fdsets")
            return not any(parse_mark(fd.get("opaque", "")) for one in sets for fd in one["fds"])

        await until("the marks to be gone", clean, patient(60.0))


@asynccontextmanager
async def bench_of(hosts: Hosts, qemu: Qemu, directory: Path) -> AsyncIterator[Bench]:
    vm = unique(f"qemu hostile {next(NUMBERS)}")
    image = that_can_boot_again(await make_image(directory, 96, 1, "random"), directory)
    memory = memory_options("memfd", MACHINE, directory, vm)
    async with AsyncExitStack() as stack:
        source = await hosts.start(hosts.pair.home, qemu, vm, memory, image, kind="hidden")
        stack.push_async_callback(source.process.kill)
        proxy = await stack.enter_async_context(proxy_of(source, monitors(hosts.pair.home) / f"{vm}-a.qmp"))
        await hosts.knows(hosts.pair.home, vm, machines_pb2.MACHINE_STATE_RUNNING)
        await source.warm(image)
        yield Bench(hosts, qemu, image, memory, source, proxy)


@pytest_asyncio.fixture(loop_scope="module", params=["7.2", "10.0"])
async def bench(request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path) -> AsyncIterator[Bench]:
    qemu: Qemu = request.getfixturevalue({"7.2": "qemu72", "10.0": "qemu10"}[request.param])
    async with bench_of(hosts, qemu, tmp_path) as made:
        yield made


async def kill(vm: Vm) -> None:
    await vm.process.kill()


def mischief(kind: Mischief) -> Callable[[], Awaitable[Mischief]]:
    async def act() -> Mischief:
        return kind

    return act


async def test_a_destination_that_dies_at_any_step_leaves_the_guest_on_its_source(bench: Bench) -> None:
    for step in ("add-fd", "migrate-set-capabilities", "getfd", "migrate-incoming"):
        async with bench.attempt() as attempt:
            attempt.at_waiting.at[step] = lambda waiting=attempt.waiting: kill(waiting)
            last = await bench.move()
            assert last.phase in FAILED, (step, last)
            assert step not in attempt.at_waiting.at, f"{step} was never sent"
            assert "cont" not in attempt.at_waiting.seen
        await bench.runs_on()
    await bench.moves()


async def test_a_monitor_of_the_destination_that_fails_leaves_the_guest_on_its_source(bench: Bench) -> None:
    cases = [("add-fd", Mischief.LIE), ("getfd", Mischief.CLOSE), ("migrate-incoming", Mischief.CLOSE)]
    for step, kind in cases:
        async with bench.attempt() as attempt:
            attempt.at_waiting.at[step] = mischief(kind)
            last = await bench.move()
            assert last.phase in FAILED, (step, kind, last)
            assert "cont" not in attempt.at_waiting.seen
        await bench.runs_on()


async def test_a_monitor_of_the_source_that_fails_leaves_the_guest_running(bench: Bench) -> None:
    """A `stop` without an answer has stopped the guest all the same."""
    cases = [("stop", Mischief.CLOSE), (bench.save, Mischief.CLOSE), ("stop", Mischief.MUTE)]
    for step, kind in cases:
        async with bench.attempt() as attempt:
            attempt.at_source.at[step] = mischief(kind)
            last = await bench.move()
            assert last.phase in FAILED, (step, kind, last)
            assert "cont" not in attempt.at_waiting.seen
        await bench.runs_on()


async def test_a_source_that_dies_in_the_blackout_runs_nowhere(hosts: Hosts, qemu72: Qemu, tmp_path: Path) -> None:
    async with bench_of(hosts, qemu72, tmp_path) as bench, bench.attempt() as attempt:
        attempt.at_source.at["migrate"] = lambda: kill(bench.source)
        last = await bench.move()
        assert last.phase not in {mg.PHASE_COMPLETED, mg.PHASE_POSTCOPY}, last
        assert "cont" not in attempt.at_waiting.seen


async def test_others_act_on_the_source_in_the_middle(bench: Bench) -> None:
    source = bench.source

    async def plug() -> None:
        await source.ask("device_add", driver="virtio-rng-pci", id="rng")

    async def reset() -> None:
        await source.ask("system_reset")

    async def carry_on() -> None:
        await source.ask("cont")

    async with bench.attempt() as attempt:  # the state of one in the blackout is not that of the VM that runs
        attempt.at_source.at[bench.save] = carry_on
        assert (await bench.move()).phase in FAILED
        assert "cont" not in attempt.at_waiting.seen
    await bench.runs_on()
    async with bench.attempt() as attempt:  # a device that the waiting QEMU has not
        attempt.at_source.at["stop"] = plug
        assert (await bench.move()).phase in FAILED
    await bench.runs_on()
    await bench.moves(reset, "-device", "virtio-rng-pci,id=rng")


DEBUGGER = """
import ctypes, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0, ctypes.get_errno()
print("here", flush=True)
time.sleep(1000)
"""
"""Seizes a process as a debugger does (PTRACE_SEIZE)."""


async def test_a_debugger_on_the_waiting_qemu_is_named_and_the_guest_runs_on(bench: Bench) -> None:
    async with bench.attempt() as attempt:
        pid = str(attempt.waiting.process.pid)
        words = (sys.executable, "-c", DEBUGGER, pid)
        debugger = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        try:
            assert debugger.stdout is not None
            assert await debugger.stdout.readline() == b"here\n"
            last = await bench.move()
        finally:
            debugger.kill()
            await debugger.wait()
        assert last.phase in FAILED
        assert str(debugger.pid) in last.reason and not last.downtime_s, last.reason
        await bench.runs_on()
        last = await bench.move()
        assert last.phase == mg.PHASE_COMPLETED or LATE in last.reason, "the same QEMU, without the debugger"


async def test_the_descriptors_of_a_source_are_as_before_an_attempt(bench: Bench) -> None:
    def descriptors() -> list[str]:
        directory = Path(f"/proc/{bench.source.process.pid}/fd")
        return sorted(os.readlink(one).split(":")[0] for one in directory.iterdir())  # noqa: PTH115 the text alone

    before = descriptors()
    async with bench.attempt() as attempt:
        attempt.at_waiting.at["migrate-incoming"] = lambda: kill(attempt.waiting)
        assert (await bench.move()).phase in FAILED
    await bench.runs_on()

    async def same() -> bool:
        return descriptors() == before

    await until("the descriptors to be given back", same, patient(60.0))
