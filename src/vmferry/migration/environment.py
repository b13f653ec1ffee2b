"""What the core is given: the ports, this host's name and the deadlines. Plugged together by `daemon/app.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import VmmIdentity
from vmferry.ports import Clock, Pagers, Peers, Processors, Store, Vmm, Vmms


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Longest waits, seconds."""

    step_s: float = 90.0
    """One step before the commit. Above the adapters' own deadlines, which name the cause better."""
    start_s: float = 10.0
    """After the commit: how long Start is repeated before the job shows UNDECIDED. It goes on after that."""
    vmm_return_s: float = 15.0
    """For a VMM to connect again (it tries every 0.2 s) before it counts as dead."""
    refuse_s: float = 10.0
    """One attempt to make the destination refuse."""
    refuse_attempts: int = 20
    """Attempts in the background, with back-off."""
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0
    progress_s: float = 0.2
    """Between two looks at a pager's progress."""
    stop_s: float = 30.0
    """Graceful stop: how long jobs past the point of no return are waited for."""


class SystemClock:
    """The host's clocks."""

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class UncheckedProcessors:
    """They sleep when they like."""

    def keep_awake(self, who: str) -> None:
        pass

    def let_sleep(self, who: str) -> None:
        pass


def process_lives(pid: int) -> bool:
    """Whether the process is there and no zombie (proc_pid_stat(5), field 3)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside the core."""

    host: str
    store: Store
    vmms: Vmms
    pagers: Pagers
    peers: Peers
    clock: Clock = field(default_factory=SystemClock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    vmm_lives: Callable[[int], bool] = process_lives
    """Whether a VMM's process is there: one that is not will not connect again."""
    push_bytes_per_s: int = 0
    """Push limit of jobs that ask for none, bytes a second; 0: no limit."""
    processors: Processors = field(default_factory=UncheckedProcessors)


Spawn = Callable[[str, Coroutine[Any, Any, None]], object]
"""Starts a task of the service, by name; it goes on when its starter ends."""


class Backoff:
    """Growing pauses between attempts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._next_s = world.timeouts.backoff_first_s

    async def pause(self) -> None:
        await self._world.clock.sleep(self._next_s)
        self._next_s = min(self._next_s * 2, self._world.timeouts.backoff_max_s)


SOURCE_STATES: frozenset[str] = frozenset({"running", "stopped"})


async def vmm_by_pid(world: World, vm: str, pid: int | None) -> Vmm:
    """The VMM that is on this host for `vm`, waited for if its connection is away for the moment.

    `pid` tells two VMMs of one VM apart (a move within the host); None: unknown, take the one that holds the VM.
    Raises: VmferryError VMM_GONE if its process has ended, or it does not come back in time.
    """
    deadline = world.clock.monotonic_s() + world.timeouts.vmm_return_s
    while True:
        found = _connected(world, vm, pid)
        if found is not None:
            return found
        if pid is not None and not world.vmm_lives(pid):
            raise VmferryError(
                Reason.VMM_GONE, f"the VMM of {vm} (pid {pid}) has ended.", "Look at the VMM's own log for why."
            )
        if world.clock.monotonic_s() >= deadline:
            raise VmferryError(
                Reason.VMM_GONE,
                f"the VMM of {vm} (pid {pid or 'unknown'}) has not been connected for "
                f"{world.timeouts.vmm_return_s:g} s.",
                "Look at the VMM's own log for why it ended.",
            )
        await world.clock.sleep(0.05)


def _connected(world: World, vm: str, pid: int | None) -> Vmm | None:
    held = [vmm for vmm in world.vmms.all() if vmm.identity.vm == vm]
    if pid is not None:
        return next((vmm for vmm in held if vmm.identity.pid == pid), None)
    return next((vmm for vmm in held if _holds_vm(vmm.identity)), None)


def _holds_vm(identity: VmmIdentity) -> bool:
    return identity.state in SOURCE_STATES
