"""A core that a test scripts: the daemon's frame without VMMs, pagers, peers and store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmferry.daemon.config import Config
from vmferry.daemon.security import Security
from vmferry.errors import Reason, VmferryError
from vmferry.model.facts import MoveFacts
from vmferry.model.migration import Job
from vmferry.model.problems import Problem
from vmferry.ops.state import Check, State


class ScriptedSide:
    """Every part of the core that calls go to: knows nothing, refuses politely."""

    async def job(self, migration: str) -> Job:
        raise VmferryError(Reason.MIGRATION_UNKNOWN, f"No migration {migration}.")

    async def admit(self, migration: str, job: str, source: str | None = None) -> None:
        pass

    async def hello(self, migration: str) -> str:
        return f"host-of-{migration}"

    async def jobs(self) -> list[Job]:
        return []

    async def cancel(self, migration: str) -> Job:
        return await self.job(migration)

    def of_job(self, job: Job) -> MoveFacts:
        raise AssertionError("there are no jobs")

    async def state(self) -> State:
        return State("host-a", 0)

    async def problems(self) -> Sequence[Problem]:
        return ()

    def note_checks(self, checks: Sequence[Check]) -> None:
        pass


@dataclass
class ScriptedCore:
    """`faults` ends a service: None makes it return. `drained` ends the wait for jobs."""

    faults: asyncio.Queue[Exception | None] = field(default_factory=asyncio.Queue)
    begin: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    story: list[str] = field(default_factory=list)
    migrations: Any = field(default_factory=ScriptedSide)
    moves: Any = field(default_factory=ScriptedSide)
    machines: Any = field(default_factory=ScriptedSide)
    qemus: Any = field(default_factory=ScriptedSide)
    incoming: Any = field(default_factory=ScriptedSide)
    state: Any = field(default_factory=ScriptedSide)
    security: Security | None = None

    def services(self) -> Mapping[str, Coroutine[object, object, None]]:
        return {"scripted": self._service()}

    async def _service(self) -> None:
        try:
            if (fault := await self.faults.get()) is not None:
                raise fault
        except asyncio.CancelledError:
            self.story.append("service cancelled")
            raise

    async def started(self) -> None:
        await self.begin.wait()
        self.story.append("started")

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        self.story.append(f"drain {limit_s:g}")
        waiting = {asyncio.create_task(hurry.wait()), asyncio.create_task(self.drained.wait())}
        _, left = await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        self.story.append("hurried" if hurry.is_set() else "drained")

    @contextlib.asynccontextmanager
    async def assemble(self, _config: Config, security: Security) -> AsyncIterator[ScriptedCore]:
        self.security = security
        self.story.append("open")
        try:
            yield self
        finally:
            self.story.append("closed")
