"""Disturbances of the hosts and of the network while a guest moves."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import dataclass, replace

from tests.support.network.emulator import Conditions
from tests.support.network.hosts import Disturbance, NetworkPair, in_postcopy
from vmferry.demo.course import Course

STALL_S = 0.3
BETWEEN_STALLS_S = 0.7


def stalls(which: str) -> Disturbance:
    """The daemon of "home" or "away" runs for no 300 ms of each second, from before the migration on."""

    async def disturb(pair: NetworkPair, course: Course) -> None:
        process = {"home": pair.home, "away": pair.away}[which].process
        assert process is not None
        try:
            while True:
                process.signal(signal.SIGSTOP)
                await asyncio.sleep(STALL_S)
                process.signal(signal.SIGCONT)
                await asyncio.sleep(BETWEEN_STALLS_S)
        finally:
            process.signal(signal.SIGCONT)

    return disturb


@dataclass(frozen=True, slots=True)
class Hole:
    """Nothing passes for so long once the guest runs on the destination; then the push has no limit any more."""

    seconds: float
    conditions: Conditions
    direction: str = "both"

    async def __call__(self, pair: NetworkPair, course: Course) -> None:
        vm = course.cast.source.vm
        await in_postcopy(pair, vm)
        pair.emulator.set(replace(self.conditions, hole=True), self.direction)
        await asyncio.sleep(self.seconds)
        pair.emulator.set(self.conditions)
        await pair.home_api.set_push_limit(vm, 0)
