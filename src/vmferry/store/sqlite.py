"""`ports.Store` on SQLite: a write-ahead log, every commit synced (`synchronous=FULL`), all writes in one thread.

The log's file gets its full size when the store is opened. A commit that overwrites it is durable once its data is on
disk. A commit that lengthens it would also wait for the file system's journal, and so for other writers.

One thread has the writing connection and keeps the order of writes. A caller that is cancelled while it waits may find
its write done, as after a lost answer. Another thread reads: a reader of the log waits for no writer. Only a journal is
read in the writing thread, because a recovery must see the entries of cancelled callers.

While the store is reserved, the next write transaction begins with the end of the one before, so that the write lock
stays here. A full disk sends journal entries to `SpareJournal`, and each reservation has a slot there.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

import vmferry.store.schema as schema_package
from vmferry.errors import Reason, VmferryError
from vmferry.model.facts import Event
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Incoming, Job
from vmferry.model.totals import Totals
from vmferry.store import queries
from vmferry.store.spare_journal import SpareJournal
from vmferry.units import MIB

Result = TypeVar("Result")

log = structlog.get_logger()

SPARED = "store.journal_spared"
"""The disk is full, and the entry is durable all the same."""

BUSY_S = 5.0
"""The longest wait for a lock of another process, e.g. of a backup."""
EVENTS_WAIT_S = 0.1
"""The pause before the next look whether a switchover has let go of the store."""
RESERVED_MOST_S = 30.0
"""The longest life of a reservation: other processes write too, e.g. a backup."""
LOG_BYTES = 6 * MIB
"""The size of the write-ahead log's file. SQLite restarts it after 1000 pages of 4 KiB (wal_autocheckpoint)."""


class SqliteStore:
    """The store. `open_store` makes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._reading_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-reads")
        self._engine: Engine | None = None
        self._spare: SpareJournal | None = None
        """Of the writing thread."""
        self._reading: Engine | None = None
        self._reserved: dict[str, asyncio.TimerHandle] = {}

    async def close(self) -> None:
        for key in list(self._reserved):
            self.release(key)
        if self._reading is not None:
            await self._in(self._reading_thread, self._reading.dispose)
        if self._engine is not None:
            await self._in(self._thread, self._engine.dispose)
        if self._spare is not None:
            await self._in(self._thread, self._spare.close)
        self._reading_thread.shutdown(wait=False)
        self._thread.shutdown(wait=False)

    async def save_job(self, job: Job) -> Job:
        return await self._do(queries.save_job, job)

    async def job(self, migration: str) -> Job | None:
        return await self._read(queries.job, migration)

    async def jobs(self) -> Sequence[Job]:
        return await self._read(queries.jobs)

    async def job_revisions(self, after: int, limit: int) -> Sequence[Job]:
        return await self._read(queries.job_revisions, after, limit)

    async def append_journal(self, entry: JournalEntry) -> None:
        promised = sum(key.rpartition("-")[0] != entry.migration for key in self._reserved)
        await self._in(self._thread, lambda: self._append(entry, promised))

    async def journal(self, migration: str) -> Sequence[JournalEntry]:
        return await self._in(self._thread, lambda: self._journal(migration))

    async def save_incoming(self, incoming: Incoming) -> None:
        await self._do(queries.save_incoming, incoming)

    async def incoming(self, migration: str) -> Incoming | None:
        return await self._read(queries.incoming, migration)

    async def incomings(self) -> Sequence[Incoming]:
        return await self._read(queries.incomings)

    async def incoming_journals(self) -> Mapping[str, Sequence[JournalEntry]]:
        return await self._do(queries.incoming_journals)

    async def totals(self) -> Totals:
        return await self._read(queries.totals)

    async def add_events(self, events: Sequence[tuple[str, Event]]) -> None:
        while self._reserved:  # noqa: ASYNC110 a blackout is short, and ends by a timer at the latest
            await asyncio.sleep(EVENTS_WAIT_S)
        await self._do(queries.add_events, events)

    async def events(self, migration: str) -> Sequence[Event]:
        return await self._read(queries.events, migration)

    async def newest_events(self, limit: int) -> Sequence[tuple[str, Event]]:
        return await self._read(queries.newest_events, limit)

    async def forget(self, jobs: Sequence[str], incomings: Sequence[str]) -> None:
        while self._reserved:  # noqa: ASYNC110
            await asyncio.sleep(EVENTS_WAIT_S)
        await self._do(queries.forget, jobs, incomings)

    async def record_errors(self, vm: str, errors: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        return await self._do(queries.record_errors, vm, errors)

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        return await self._read(queries.ledger, vm)

    async def ledger_changes(self, vm: str, after: int, limit: int) -> Sequence[tuple[int, str, LedgerEntry]]:
        return await self._read(queries.ledger_changes, vm, after, limit)

    async def life(self, vm: str) -> str:
        return await self._read(queries.life, vm)

    async def begin_life(self, vm: str, life: str, keeps_ledger: bool) -> None:
        await self._do(queries.begin_life, vm, life, keeps_ledger)

    async def reserve(self, key: str) -> None:
        """See `ports.Store`. The number that it writes has no other use."""
        self.release(key)
        self._reserved[key] = asyncio.get_running_loop().call_later(RESERVED_MOST_S, self.release, key)
        try:
            await self._do(queries.show_writable)
            if self._spare is not None and self._spare.free < len(self._reserved):
                raise self._failed("the spare room for journal entries is used up")
        except VmferryError:
            self.release(key)
            raise

    def release(self, key: str) -> None:
        timer = self._reserved.pop(key, None)
        if timer is not None:
            timer.cancel()
            self._thread.submit(self._keep_or_let_go)

    async def open(self) -> None:
        """Makes or upgrades the schema. Raises: VmferryError STORE_FAILED."""
        self._engine = await self._in(self._thread, lambda: _engine(self._path))
        spare = self._path.with_name(self._path.name + "-spare")
        self._spare = await self._in(self._thread, lambda: SpareJournal(spare))
        self._reading = await self._in(self._reading_thread, lambda: _reading_engine(self._path))

    async def _do(self, query: Callable[..., Result], *arguments: Any) -> Result:
        """Runs one write transaction, which is durable when this returns."""
        return await self._in(self._thread, lambda: self._write(query, *arguments))

    def _write(self, query: Callable[..., Result], *arguments: Any) -> Result:
        """Runs in the writing thread. Entries of the spare journal go first."""
        engine = self._opened(self._engine)
        spare = self._spare.entries if self._spare is not None else ()
        try:
            with engine.begin() as db:
                queries.append_missing(db, spare)
                result = query(db, *arguments)
        finally:
            self._keep_or_let_go()
        if spare and self._spare is not None:
            self._spare.clear()
        return result

    def _append(self, entry: JournalEntry, promised: int) -> None:
        """Leaves `promised` slots of the spare journal to other migrations: their VMs may be stopped."""
        try:
            self._write(queries.append_journal, entry)
        except SQLAlchemyError as error:
            spare = self._spare
            if not _lacks_space(error) or spare is None or spare.free <= promised or not spare.append(entry):
                raise
            log.warning(SPARED, migration=entry.migration, kind=entry.kind, error=str(error.__cause__))

    def _journal(self, migration: str) -> Sequence[JournalEntry]:
        engine = self._opened(self._engine)
        try:
            with engine.begin() as db:
                found = queries.journal(db, migration)
        finally:
            self._keep_or_let_go()
        spare = self._spare.entries if self._spare is not None else ()
        return [*found, *(entry for entry in spare if entry.migration == migration and entry not in found)]

    async def _read(self, query: Callable[..., Result], *arguments: Any) -> Result:
        engine = self._opened(self._reading)

        def work() -> Result:
            with engine.begin() as db:
                return query(db, *arguments)

        return await self._in(self._reading_thread, work)

    def _opened(self, engine: Engine | None) -> Engine:
        if engine is None:
            raise VmferryError(Reason.STORE_FAILED, f"the store {self._path} is not open.")
        return engine

    def _keep_or_let_go(self) -> None:
        """Takes the write lock again for a reserved store, or lets it go. It waits for nobody: a process that was
        quicker has the lock, and the next write waits for that one.
        """
        if self._engine is None:
            return
        with closing(self._engine.raw_connection()) as pooled:
            connection = cast("sqlite3.Connection", pooled.dbapi_connection)
        # Outside of the pool: it ends the transaction of a connection that comes back.
        if not self._reserved and connection.in_transaction:
            connection.execute("ROLLBACK")
        elif self._reserved and not connection.in_transaction:
            connection.execute("PRAGMA busy_timeout = 0")
            with suppress(sqlite3.OperationalError):
                connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except (SQLAlchemyError, sqlite3.Error, CommandError, OSError) as error:
            raise self._failed(str(getattr(error, "orig", None) or error)) from error

    def _failed(self, what: str) -> VmferryError:
        return VmferryError(
            Reason.STORE_FAILED,
            f"the store {self._path}: {what}",
            "Check the disk's space and the file's permissions; a newer vmferry may have upgraded it.",
        )


def _lacks_space(error: SQLAlchemyError) -> bool:
    """Whether a write failed for the disk (sqlite.org/rescode.html). Each extended code has its primary code below."""
    code = getattr(error.__cause__, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


async def open_store(path: Path) -> SqliteStore:
    """Opens the store in a file and makes the file if it is missing. Raises: VmferryError STORE_FAILED."""
    store = SqliteStore(path)
    await store.open()
    return store


def _engine(path: Path) -> Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = _connected(path)
    event.listen(engine, "begin", _begin)
    with engine.begin() as db:
        _upgrade(db)
    with closing(engine.raw_connection()) as pooled:
        _lengthen_log(pooled.cursor())
    return engine


def _reading_engine(path: Path) -> Engine:
    engine = _connected(path)
    event.listen(engine, "begin", lambda db: db.exec_driver_sql("BEGIN"))
    return engine


def _connected(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=StaticPool,
        connect_args={"timeout": BUSY_S, "check_same_thread": False},
    )
    event.listen(engine, "connect", _on_connect)
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
    """A reserved store has begun already."""
    if not cast("sqlite3.Connection", db.connection.dbapi_connection).in_transaction:
        db.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(db: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema_package.__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, "head")
