"""Plans the failures of a fake's steps and records the steps.

A step has a name such as `vmm.stop` or `store.journal commit`. It can fail before its effect, or after it, so that the
answer is lost. It can also hang: a test then looks at the host, or kills it, at that very point.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Fault:
    """One planned failure or hang of a step."""

    error: Exception | None
    after: bool
    times: int


@dataclass(slots=True)
class Script:
    """The script of one host. `dead`: the host was killed, and none of its steps has an effect any more."""

    host: str = ""
    transcript: list[str] = field(default_factory=list)
    dead: bool = False
    faults: dict[str, Fault] = field(default_factory=dict)
    hung: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a step hangs."""
    released: asyncio.Event = field(default_factory=asyncio.Event)
    observe: Callable[[], None] = lambda: None
    """Called after every effect, so that a test can check its invariants."""
    points: int = 0
    hang_at_point: int | None = None
    """Hang at the n-th point. Every step has two points: before and after its effect."""

    def fail_at(self, step: str, error: Exception, *, after: bool = False, times: int = 1) -> None:
        """Lets the next `times` calls of a step raise; `after`: after the effect."""
        self.faults[step] = Fault(error, after, times)

    def hang_at(self, step: str, *, after: bool = False) -> None:
        """Lets the next call of a step wait until `release` or `kill`."""
        self.faults[step] = Fault(None, after, 1)

    def release(self) -> None:
        self.released.set()

    def kill(self) -> None:
        """Ends the host as SIGKILL does: a step that hangs ends there, and no later step has an effect."""
        self.dead = True
        self.released.set()

    async def do(self, step: str, effect: Callable[[], None] = lambda: None) -> None:
        """One step: point, planned fault, effect, point, planned fault."""
        await self._point(step, after=False)
        self.transcript.append(step)
        effect()
        self.observe()
        await self._point(step, after=True)

    async def _point(self, step: str, *, after: bool) -> None:
        await asyncio.sleep(0)
        self._end_if_dead()
        self.points += 1
        fault = self.faults.get(step)
        planned = fault is not None and fault.after is after and fault.times > 0
        if planned and fault is not None:
            fault.times -= 1
            if fault.error is not None:
                raise fault.error
        if planned or self.points == self.hang_at_point:
            self.hung.set()
            await self.released.wait()
            self._end_if_dead()

    def _end_if_dead(self) -> None:
        if self.dead:
            raise asyncio.CancelledError(f"host {self.host} is dead")
