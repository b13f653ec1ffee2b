"""Whole hosts in memory: a real `MigrationService` over fakes. A test can kill a host and start it again.

VMMs, pagers and the store outlive the daemon, as on a real host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vmferry.migration.environment import Environment, NoStarter
from vmferry.migration.service import MigrationService
from vmferry.migration.timeouts import Timeouts
from vmferry.model.memory import MemoryRoom
from vmferry.model.migration import TERMINAL, Job
from vmferry.ports import VmmStarter
from vmferry.testing.clock import ManualClock
from vmferry.testing.pager import FakePagers
from vmferry.testing.peer import Destination, FakePeers
from vmferry.testing.script import Script
from vmferry.testing.store import MemoryStore
from vmferry.testing.vmm import FakeVmm, FakeVmms, identity

TIMEOUTS = Timeouts(downtime_s=60.0, start_s=1.0, vmm_return_s=1.0, refuse_attempts=5, stop_s=5.0)


class Network:
    """The daemons that listen, by address."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.hosts: dict[str, FakeHost] = {}
        self.cut: set[str] = set()

    def host(self, name: str, *, arrives: bool = True) -> FakeHost:
        return self.hosts.setdefault(name, FakeHost(self, name, arrives=arrives))

    def find(self, address: str) -> Destination | None:
        host = self.hosts.get(address)
        if host is None or address in self.cut or host.service is None:
            return None
        return host.service.incoming


class FakeProcessors:
    """The requests to keep CPUs awake: those that last, and all so far."""

    def __init__(self) -> None:
        self.awake: set[str] = set()
        self.ever: list[str] = []

    def keep_awake(self, who: str) -> None:
        self.awake.add(who)
        self.ever.append(who)

    def let_sleep(self, who: str) -> None:
        self.awake.discard(who)


class FakeRooms:
    """The limits of a host, and of processes by pid: this process is the daemon. Each is for one page size."""

    def __init__(self) -> None:
        self.host: dict[int, MemoryRoom] = {}
        self.processes: dict[tuple[int, int], MemoryRoom] = {}

    def of_host(self, page_size: int) -> Sequence[MemoryRoom]:
        return [self.host[page_size]] if page_size in self.host else []

    def of_process(self, pid: int, page_size: int) -> Sequence[MemoryRoom]:
        room = self.processes.get((pid, page_size))
        return [] if room is None else [room]


class FakeHost:
    """One host. Use `start`, then `stop` or `kill`."""

    def __init__(self, network: Network, name: str, *, arrives: bool) -> None:
        self.name = name
        self.network = network
        self.script = Script(name)
        self.vmms = FakeVmms()
        self.pagers = FakePagers(self.script, arrives=arrives)
        self.store = MemoryStore(self.script)
        self.processors = FakeProcessors()
        self.service: MigrationService | None = None
        self.timeouts = TIMEOUTS
        """Read at the next start."""
        self.memory_rooms = FakeRooms()
        self.starter: VmmStarter = NoStarter()
        self.ended: set[int] = set()
        """The ended processes of VMMs, by pid."""
        self.push_bytes_per_s = 0
        """The configured limit, read at the next start."""
        self._task: asyncio.Task[None] | None = None
        self._end = asyncio.Event()

    def add_vmm(self, vm: str, state: str, pid: int, platform: str = "x86_64/process") -> FakeVmm:
        return self.vmms.add(FakeVmm(identity(vm, state, pid, platform), self.script))

    async def start(self) -> MigrationService:
        self._renew_script()
        self._end = asyncio.Event()
        started = asyncio.Event()
        self._task = asyncio.create_task(self._run(started), name=f"host {self.name}")
        waits = asyncio.create_task(started.wait())
        await asyncio.wait((waits, self._task), return_when=asyncio.FIRST_COMPLETED)
        waits.cancel()
        if self.service is None:
            self._task.result()
        assert self.service is not None
        return self.service

    async def stop(self) -> None:
        """Stops the daemon as SIGTERM does."""
        self._end.set()
        if self._task is not None:
            await self._task
            self._task = None

    async def kill(self) -> None:
        """Ends the daemon as SIGKILL does."""
        self.service = None
        self.script.kill()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def job_where(self, migration: str, *, phases: frozenset[str] | None = None, within_s: float = 30) -> Job:
        """Waits until the job is in one of the phases, by default until it has ended."""
        wanted = phases or frozenset(TERMINAL)
        async with asyncio.timeout(within_s):
            while True:
                job = await self.store.job(migration)
                if job is not None and job.phase in wanted:
                    return job
                await asyncio.sleep(0.001)

    async def _run(self, started: asyncio.Event) -> None:
        net = self.network
        environment = Environment(
            host=self.name,
            store=self.store,
            vmms=self.vmms,
            pagers=self.pagers,
            peers=FakePeers(self.script, net.find),
            clock=net.clock,
            timeouts=self.timeouts,
            vmm_lives=lambda pid: pid not in self.ended,
            vmm_life=lambda pid: "" if pid in self.ended else str(pid),
            memory_rooms=self.memory_rooms,
            starter=self.starter,
            push_bytes_per_s=self.push_bytes_per_s,
            processors=self.processors,
        )
        async with MigrationService(environment) as service:
            self.service = service
            started.set()
            await self._end.wait()
        self.service = None

    def _renew_script(self) -> None:
        """Gives a new daemon a new script, so that no task of the old daemon runs again."""
        if not self.script.dead:
            return
        observe = self.script.observe
        self.script = self.store.script = self.pagers.script = Script(self.name, observe=observe)
        for vmm in self.vmms.everyone:
            vmm.script = self.script
        for pager in self.pagers.running.values():
            pager.script = self.script


@dataclass(slots=True)
class Pair:
    """Two hosts: `source` runs the VM `web` on host `a`, `destination` waits for it on `b`.

    `broken` lists the moments at which I3 or I4 did not hold: there must be none.
    """

    network: Network
    a: FakeHost
    b: FakeHost
    source: FakeVmm
    destination: FakeVmm
    broken: list[str] = field(default_factory=list)

    @property
    def service(self) -> MigrationService:
        """The service of the source's host."""
        if self.a.service is None:
            raise AssertionError("host a does not run")
        return self.a.service

    @property
    def running(self) -> int:
        return int(self.source.runs) + int(self.destination.runs)

    def nothing_left(self) -> bool:
        """Whether no pager is left, and the destination's VMM waits as before."""
        waits = not self.destination.alive or self.destination.identity.state == "incoming"
        return not self.a.pagers.running and not self.b.pagers.running and waits

    def look(self) -> None:
        """Checks I3 and I4. It runs after every effect on either host."""
        at = f"{self.a.script.transcript[-1:]} {self.b.script.transcript[-1:]}"
        here, there = self.a.store.kinds(), self.b.store.kinds()
        if self.running > 1:
            self.broken.append(f"runs twice: {at}")
        if self.destination.runs and not ("running" in there and "commit" in here):
            self.broken.append(f"runs there before it was durable: {at}")
        if self.source.runs and "commit" in here and not (here & {"aborted", "settled"} or "refused" in there):
            self.broken.append(f"runs here after the commit: {at}")
        if {"running", "refused"} <= there:
            self.broken.append(f"running and refused: {at}")


async def make_pair() -> Pair:
    """A pair with both hosts running."""
    network = Network()
    a, b = network.host("a"), network.host("b")
    pair = Pair(network, a, b, a.add_vmm("web", "running", 100), b.add_vmm("web", "incoming", 200))
    for host in (a, b):
        host.script.observe = pair.look
        await host.start()
    return pair
