"""The parts that the daemon's frame (`app.py`) needs. `assembly.py` makes them; tests have a small one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from vmferry.api.control import MachineControl, MigrationControl, MoveControl, QemuControl
from vmferry.daemon.config import Config
from vmferry.daemon.security import Security
from vmferry.ops.state import StateSource
from vmferry.peer.servicer import IncomingOperations


class Core(Protocol):
    """The parts: connected to each other, opened, and not yet running."""

    @property
    def migrations(self) -> MigrationControl: ...
    @property
    def moves(self) -> MoveControl: ...
    @property
    def machines(self) -> MachineControl: ...
    @property
    def qemus(self) -> QemuControl: ...
    @property
    def incoming(self) -> IncomingOperations: ...
    @property
    def state(self) -> StateSource: ...

    def services(self) -> Mapping[str, Coroutine[object, object, None]]:
        """The tasks that run as long as the daemon, by name. A task that returns is a fault."""
        ...

    async def started(self) -> None:
        """Waits until calls can be answered: VMMs can connect, and jobs of an earlier daemon are recovered."""
        ...

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """Takes no new jobs, cancels those before switchover, and waits for the others up to `limit_s` or until
        `hurry`.
        """
        ...


Assemble: TypeAlias = Callable[[Config, Security], AbstractAsyncContextManager[Core]]
