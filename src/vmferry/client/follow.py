"""Watching without gaps: the streams go on from the last revision seen when the daemon was away for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc

from vmferry.client.api import Api
from vmferry.client.refusal import ApiError, UnreachableError, refusal
from vmferry.v1 import machines_pb2 as machines
from vmferry.v1 import migrations_pb2 as migrations

TERMINAL_PHASES = frozenset(
    {
        migrations.PHASE_COMPLETED,
        migrations.PHASE_CANCELLED,
        migrations.PHASE_FAILED,
        migrations.PHASE_LOST,
    }
)
SHUTTING_DOWN = "SHUTTING_DOWN"
"""Reason with which a daemon that is being stopped ends its streams."""
RETRY_S = 0.3
"""Pause between attempts to reach a daemon that went away."""


async def follow_migrations(
    api: Api, migration_id: str = "", after: int = 0, patience_s: float = 30.0
) -> AsyncIterator[migrations.Migration]:
    """Every change, in order. Of one migration: ends after its terminal phase. Of all (""): goes on for ever.

    A stream that was up and breaks is taken up again for `patience_s`: a daemon may be restarted in the middle.

    Raises:
        RefusedError: the daemon does not know the migration.
        UnreachableError: no daemon from the start, or away for longer than `patience_s`.
    """
    waiting = _Patience(patience_s)
    while True:
        request = migrations.WatchMigrationsRequest(migration_id=migration_id, after_revision=after)
        try:
            async for migration in api.migrations.WatchMigrations(request):
                waiting.answered()
                after = max(after, migration.revision)
                yield migration
                if migration_id and migration.phase in TERMINAL_PHASES:
                    return
        except grpc.RpcError as error:
            waiting.broken(refusal(error))
        await asyncio.sleep(RETRY_S)


async def follow_errors(
    api: Api, vm: str = "", after: int = 0, patience_s: float = 30.0
) -> AsyncIterator[machines.MemoryErrorChange]:
    """Every change of a VM's ledger (of all VMs: ""), for ever; raises as `follow_migrations` does."""
    waiting = _Patience(patience_s)
    while True:
        request = machines.WatchMemoryErrorsRequest(vm=vm, after_revision=after)
        try:
            async for change in api.machines.WatchMemoryErrors(request):
                waiting.answered()
                after = change.revision
                yield change
        except grpc.RpcError as error:
            waiting.broken(refusal(error))
        await asyncio.sleep(RETRY_S)


class _Patience:
    """How long a broken stream is taken up again: not at all before its first answer."""

    def __init__(self, patience_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._now = now
        self._last_answer: float | None = None

    def answered(self) -> None:
        self._last_answer = self._now()

    def broken(self, error: ApiError) -> None:
        """Returns if it is worth another attempt, raises the error otherwise."""
        away = isinstance(error, UnreachableError) or error.reason == SHUTTING_DOWN
        if not away or self._last_answer is None:
            raise error
        if self._now() - self._last_answer > self._patience_s:
            raise error
