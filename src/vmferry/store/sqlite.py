"""`ports.Store` on SQLite: a write-ahead log, every commit synced (`synchronous=FULL`), all in one thread.

The log's file gets its full size when the store is opened. A commit that overwrites it is durable once its data is on
disk. A commit that lengthens it would also wait for the file system's journal, and so for other writers.

One thread has one connection and keeps the order of writes. A caller that is cancelled while it waits may find its
write done, as after a lost answer.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

import vmferry.store.schema as schema_package
from vmferry.errors import Reason, VmferryError
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Incoming, Job
from vmferry.store import queries
from vmferry.units import MIB

Result = TypeVar("Result")

BUSY_S = 5.0
"""The longest wait for a lock of another process, e.g. of a backup."""
LOG_BYTES = 6 * MIB
"""The size of the write-ahead log's file. SQLite restarts it after 1000 pages of 4 KiB (wal_autocheckpoint)."""


class SqliteStore:
    """The store. `open_store` makes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._engine: Engine | None = None

    async def close(self) -> None:
        if self._engine is not None:
            await self._in_thread(self._engine.dispose)
        self._thread.shutdown(wait=False)

    async def save_job(self, job: Job) -> Job:
        return await self._do(queries.save_job, job)

    async def job(self, migration: str) -> Job | None:
        return await self._do(queries.job, migration)

    async def jobs(self) -> Sequence[Job]:
        return await self._do(queries.jobs)

    async def job_revisions(self, after: int, limit: int) -> Sequence[Job]:
        return await self._do(queries.job_revisions, after, limit)

    async def append_journal(self, entry: JournalEntry) -> None:
        await self._do(queries.append_journal, entry)

    async def journal(self, migration: str) -> Sequence[JournalEntry]:
        return await self._do(queries.journal, migration)

    async def save_incoming(self, incoming: Incoming) -> None:
        await self._do(queries.save_incoming, incoming)

    async def incoming(self, migration: str) -> Incoming | None:
        return await self._do(queries.incoming, migration)

    async def incomings(self) -> Sequence[Incoming]:
        return await self._do(queries.incomings)

    async def record_errors(self, vm: str, errors: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        return await self._do(queries.record_errors, vm, errors)

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        return await self._do(queries.ledger, vm)

    async def ledger_changes(self, vm: str, after: int, limit: int) -> Sequence[tuple[int, str, LedgerEntry]]:
        return await self._do(queries.ledger_changes, vm, after, limit)

    async def open(self) -> None:
        """Makes or upgrades the schema. Raises: VmferryError STORE_FAILED."""
        self._engine = await self._in_thread(lambda: _engine(self._path))

    async def _do(self, query: Callable[..., Result], *arguments: Any) -> Result:
        """Runs one transaction, which is durable when this returns."""
        engine = self._engine
        if engine is None:
            raise VmferryError(Reason.STORE_FAILED, f"the store {self._path} is not open.")

        def work() -> Result:
            with engine.begin() as db:
                return query(db, *arguments)

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (SQLAlchemyError, sqlite3.Error, CommandError, OSError) as error:
            raise VmferryError(
                Reason.STORE_FAILED,
                f"the store {self._path}: {error}",
                "Check the disk's space and the file's permissions; a newer vmferry may have upgraded it.",
            ) from error


async def open_store(path: Path) -> SqliteStore:
    """Opens the store in a file and makes the file if it is missing. Raises: VmferryError STORE_FAILED."""
    store = SqliteStore(path)
    await store.open()
    return store


def _engine(path: Path) -> Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=StaticPool,
        connect_args={"timeout": BUSY_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _begin)
    with engine.begin() as db:
        _upgrade(db)
    with closing(engine.raw_connection()) as pooled:
        _lengthen_log(pooled.cursor())
    return engine


def _lengthen_log(db: DBAPICursor) -> None:
    """Lengthens the log by a transaction that overflows the cache and is rolled back. The pages stay in the file,
    because journal_size_limit is not set, and are never read. A checkpoint comes first, so that the log restarts.
    """
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE lengthens_the_log (bytes BLOB)")
    db.execute(f"INSERT INTO lengthens_the_log VALUES (zeroblob({LOG_BYTES}))")
    db.execute("ROLLBACK")


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    """`_begin` begins transactions. The driver would leave DDL out of them."""
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(db: Connection) -> None:
    db.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(db: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema_package.__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, "head")
