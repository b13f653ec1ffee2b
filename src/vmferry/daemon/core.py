"""What the daemon's frame (`app.py`) needs of the parts behind it; `assembly.py` makes them, tests have a small one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeAlias

from vmferry.api.control import MachineControl, MigrationControl
from vmferry.daemon.config import Config
from vmferry.ops.state import StateSource
from vmferry.peer.servicer import IncomingOperations


class Core(Protocol):
    """The parts, plugged together, opened and not yet running."""

    @property
    def migrations(self) -> MigrationControl: ...
    @property
    def machines(self) -> MachineControl: ...
    @property
    def incoming(self) -> IncomingOperations: ...
    @property
    def state(self) -> StateSource: ...

    def services(self) -> Mapping[str, Coroutine[object, object, None]]:
        """The tasks that run as long as the daemon does, by name: one that returns is a fault."""
        ...

    async def started(self) -> None:
        """Waits until calls can be answered: VMMs can connect, jobs of an earlier daemon are taken up."""
        ...

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """No new jobs; cancels those before switchover and waits for the others, up to `limit_s` or until `hurry`."""
        ...


Assemble: TypeAlias = Callable[[Config], AbstractAsyncContextManager[Core]]
