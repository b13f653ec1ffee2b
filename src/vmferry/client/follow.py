"""Watching without gaps: after an absence of the daemon a stream resumes at the last revision seen."""

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
"""The reason with which a stopping daemon ends its streams."""
RETRY_S = 0.3
"""The pause between attempts to reach an absent daemon."""


async def follow_migrations(
    api: Api, migration_id: str = "", after: int = 0, patience_s: float = 30.0, from_now: bool = False
) -> AsyncIterator[migrations.Migration]:
    """Yields every change in order. A watch of one migration ends after its terminal phase; a watch of all ("") never
    ends.

    A stream that breaks after it was up is opened again for `patience_s`, because a daemon may be restarted.

    Raises:
        RefusedError: the daemon does not know the migration.
        UnreachableError: no daemon from the start, or none for longer than `patience_s`.
    """
    waiting = _Patience(patience_s)
    while True:
        request = migrations.WatchMigrationsRequest(
            migration_id=migration_id, after_revision=after, from_now=from_now and not after
        )
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


async def follow_incoming(
    api: Api, migration_id: str = "", patience_s: float = 30.0
) -> AsyncIterator[migrations.Migration]:
    """Yields each migration into the daemon's host as it is, then its changes. One migration's stream ends with it."""
    waiting = _Patience(patience_s)
    while True:
        try:
            async for migration in api.migrations.WatchIncoming(migrations.WatchIncomingMigrationsRequest()):
                waiting.answered()
                if migration_id in ("", migration.migration_id):
                    yield migration
                    if migration_id and migration.phase in TERMINAL_PHASES:
                        return
        except grpc.RpcError as error:
            waiting.broken(refusal(error))
        await asyncio.sleep(RETRY_S)


async def follow_errors(
    api: Api, vm: str = "", after: int = 0, patience_s: float = 30.0
) -> AsyncIterator[machines.MemoryErrorChange]:
    """Yields every change of a VM's ledger ("": of all VMs), without end. It raises as `follow_migrations` does."""
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
    """The time for which a broken stream is opened again: none before its first answer."""

    def __init__(self, patience_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._now = now
        self._last_answer: float | None = None

    def answered(self) -> None:
        self._last_answer = self._now()

    def broken(self, error: ApiError) -> None:
        """Returns if another attempt may succeed, else raises the error."""
        away = isinstance(error, UnreachableError) or error.reason == SHUTTING_DOWN
        if not away or self._last_answer is None:
            raise error
        if self._now() - self._last_answer > self._patience_s:
            raise error
