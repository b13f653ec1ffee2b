"""The environment of the core: ports, host name, deadlines. `daemon/assembly.py` puts it together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry.aio.backoff import Backoff
from vmferry.aio.wall_clock import now_us
from vmferry.migration.timeouts import Timeouts
from vmferry.model.memory import MemoryRoom
from vmferry.ports import Clock, MemoryRooms, Pagers, Peers, Processors, Store, Vmms, VmmStarter


class SystemClock:
    """The host's clocks."""

    def now_us(self) -> int:
        return now_us()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class UncheckedProcessors:
    """CPUs that may enter idle states at any time."""

    def keep_awake(self, who: str) -> None:
        pass

    def let_sleep(self, who: str) -> None:
        pass


class NoStarter:
    """A host without a starter."""

    async def start(self, vm: str, platform: str) -> None:
        pass


class Unlimited:
    """A host whose memory nothing limits."""

    def of_host(self, page_size: int) -> Sequence[MemoryRoom]:
        del page_size
        return ()

    def of_process(self, pid: int, page_size: int) -> Sequence[MemoryRoom]:
        del pid, page_size
        return ()


def process_lives(pid: int) -> bool:
    """Whether the process exists and is no zombie (proc_pid_stat(5), field 3)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def process_life(pid: int) -> str:
    """The process by its number, its start (proc_pid_stat(5), field 22) and the host's boot; "" if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(errors="surrogateescape").strip()
    except OSError:
        return ""
    return f"{pid} {stat.rpartition(')')[2].split()[19]} {boot}"


@dataclass(frozen=True, slots=True)
class History:
    """How long ended migrations are kept. Both limits hold; counters of the metrics do not depend on them."""

    keep_s: float = 30 * 86400.0
    keep_most: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Everything outside the core, frozen."""

    host: str
    store: Store
    vmms: Vmms
    pagers: Pagers
    peers: Peers
    clock: Clock = field(default_factory=SystemClock)
    timeouts: Timeouts = field(default_factory=Timeouts)
    vmm_lives: Callable[[int], bool] = process_lives
    """Whether a VMM's process lives. A dead one will not connect again."""
    vmm_life: Callable[[int], str] = process_life
    """Tells a VMM's process from any other, also from a later one of its pid; "": it cannot be told."""
    starter: VmmStarter = field(default_factory=NoStarter)
    memory_rooms: MemoryRooms = field(default_factory=Unlimited)
    push_bytes_per_s: int = 0
    """The push limit of jobs that request none, bytes per second; 0: no limit."""
    processors: Processors = field(default_factory=UncheckedProcessors)
    history: History = field(default_factory=History)

    def backoff(self) -> Backoff:
        """The pauses of a new retry loop."""
        return Backoff(self.clock.sleep, self.timeouts.backoff_first_s, self.timeouts.backoff_max_s)


Spawn = Callable[[str, Coroutine[Any, Any, None]], object]
"""Starts a named task of the service. The task outlives its starter."""
