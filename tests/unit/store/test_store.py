"""The contract of `ports.Store`, for the store in memory and for SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.moves import come
from vmferry.errors import Reason, VmferryError
from vmferry.model.facts import Event
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import Incoming, Job, Outcome, PageProgress, Phase
from vmferry.ports import Store
from vmferry.store import sqlite
from vmferry.store.sqlite import SqliteStore, open_store
from vmferry.testing.store import MemoryStore
from vmferry.units import Gpa


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    opened = await open_store(tmp_path / "state" / "vmferry.db")
    yield opened
    await opened.close()


def job(name: str, created_us: int = 1) -> Job:
    return Job(name, "web", "b:7601", created_us=created_us)


async def test_a_job_comes_back_as_it_was_saved(store: Store) -> None:
    progress = PageProgress(total=10, absent=3, push=7)
    full = replace(
        job("m1"),
        phase=Phase.FAILED,
        reason_code=Reason.VMM_GONE,
        reason="ü",
        downtime_s=0.25,
        progress=progress,
        push_bytes_per_s=1 << 40,
    )
    saved = await store.save_job(full)
    assert saved == replace(full, revision=saved.revision)
    assert await store.job("m1") == saved
    assert await store.job("m2") is None


async def test_revisions_are_global_and_all_are_kept(store: Store) -> None:
    first = await store.save_job(job("m1"))
    second = await store.save_job(job("m2"))
    third = await store.save_job(replace(first, phase=Phase.PREPARING))
    assert first.revision < second.revision < third.revision
    assert await store.job_revisions(0, 10) == [first, second, third]
    assert await store.job_revisions(first.revision, 1) == [second]
    assert await store.jobs() == [third, second]


async def test_jobs_are_listed_by_creation_though_the_clock_was_set_back(store: Store) -> None:
    first = await store.save_job(job("first", 9))
    await store.save_job(job("second", 1))
    await store.save_job(job("another", 1))
    await store.save_job(replace(first, phase=Phase.PREPARING))
    assert [one.migration for one in await store.jobs()] == ["first", "second", "another"]


async def test_incoming_migrations_are_listed_by_their_arrival(store: Store) -> None:
    for name in ("m2", "m1", "m3", "m2"):
        await store.save_incoming(Incoming(name, "web", "a", Outcome.PREPARED))
    assert [one.migration for one in await store.incomings()] == ["m2", "m1", "m3"]


async def test_the_journal_keeps_order_and_data(store: Store) -> None:
    entries = [
        JournalEntry("m1", "begin", 1, {"vmm_pid": 7}),
        JournalEntry("m2", "refused", 2, {"reason": "no"}),
        JournalEntry("m1", "commit", 3, {}),
    ]
    for entry in entries:
        await store.append_journal(entry)
    assert await store.journal("m1") == [entries[0], entries[2]]
    assert await store.journal("m2") == [entries[1]]
    assert await store.journal("m3") == []


async def test_an_incoming_migration_is_replaced(store: Store) -> None:
    record = Incoming("m1", "web", "a", Outcome.PREPARED)
    await store.save_incoming(record)
    later = replace(record, outcome=Outcome.RUNNING, progress=PageProgress(total=4), lost_reason="died")
    await store.save_incoming(later)
    assert await store.incoming("m1") == later
    assert await store.incomings() == [later]
    assert await store.incoming("m2") is None


async def test_errors_are_merged_and_every_change_is_kept(store: Store) -> None:
    first = LedgerEntry(Gpa(0x2000), Origin.VMM, first_seen_us=1, last_seen_us=1)
    other = LedgerEntry(Gpa(0x1000), Origin.READ, first_seen_us=1, last_seen_us=1)
    seen = replace(first, severity=Severity.ACTION_REQUIRED, guest_visible=True)
    assert await store.record_errors("web", [first, other]) == [first, other]
    assert await store.record_errors("web", [seen]) == [seen]
    assert await store.record_errors("web", [first]) == []
    await store.record_errors("db", [other])
    assert await store.ledger("web") == [other, seen]
    changes = await store.ledger_changes("", 0, 10)
    assert [(vm, entry) for _, vm, entry in changes] == [("web", first), ("web", other), ("web", seen), ("db", other)]
    revisions = [revision for revision, _, _ in changes]
    assert revisions == sorted(set(revisions))
    assert await store.ledger_changes("web", revisions[1], 10) == [changes[2]]
    assert await store.ledger_changes("", 0, 2) == list(changes[:2])


async def test_the_highest_guest_physical_address(store: Store) -> None:
    entry = LedgerEntry(Gpa((1 << 64) - 4096), Origin.VMM)
    await store.record_errors("web", [entry])
    await store.record_errors("web", [replace(entry, guest_visible=True)])
    assert await store.ledger("web") == [replace(entry, guest_visible=True)]


async def test_concurrent_writers_each_get_a_revision_of_their_own(store: Store) -> None:
    saved = await asyncio.gather(*(store.save_job(job(f"m{number}")) for number in range(50)))
    assert len({one.revision for one in saved}) == 50
    assert len(await store.job_revisions(0, 100)) == 50


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    saved = await store.save_job(job("m1"))
    await store.append_journal(JournalEntry("m1", "begin", 1, {}))
    await store.record_errors("web", [LedgerEntry(Gpa(0), Origin.VMM)])
    await store.close()
    again = await open_store(path)
    assert await again.jobs() == [saved]
    assert [entry.kind for entry in await again.journal("m1")] == ["begin"]
    assert (await again.save_job(job("m2"))).revision > saved.revision
    await again.close()


async def test_writes_are_in_the_file_without_a_close(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    await store.append_journal(JournalEntry("m1", "commit", 1, {}))
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT kind FROM journal").fetchall() == [("commit",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_commits_are_synced(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "vmferry.db")
    assert store._engine is not None
    with store._engine.connect() as db:
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    await store.close()


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(VmferryError, match=r"vmferry\.db") as caught:
        await open_store(path)
    assert caught.value.reason is Reason.STORE_FAILED


async def test_a_closed_or_unopened_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(VmferryError, match="not open"):
        await SqliteStore(tmp_path / "vmferry.db").jobs()


async def test_the_schema_matches_the_tables(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from vmferry.store.tables import metadata

    store = await open_store(tmp_path / "vmferry.db")
    assert store._engine is not None
    with store._engine.connect() as db:
        assert compare_metadata(MigrationContext.configure(db), metadata) == []
    await store.close()


async def test_the_journal_does_not_lengthen_the_log(tmp_path: Path) -> None:
    """A file that grows makes each entry wait for the file system's journal, during the blackout."""
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    log = path.with_name("vmferry.db-wal")
    size = log.stat().st_size
    for number in range(1200):
        await store.append_journal(JournalEntry("m1", "begin", number, {}))
    assert log.stat().st_size == size
    await store.close()
    again = await open_store(path)
    assert len(await again.journal("m1")) == 1200
    await again.close()


async def test_a_reserved_store_waits_for_no_other_process(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    await store.reserve("m1-source")
    with closing(sqlite3.connect(path, timeout=0)) as other:
        for kind in ("begin", "commit"):
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            await store.append_journal(JournalEntry("m1", kind, 1, {}))
        assert other.execute("SELECT count(*) FROM journal").fetchone() == (2,)  # durable, and seen by others
        store.release("m1-source")
        await store.append_journal(JournalEntry("m1", "aborted", 1, {}))
        other.execute("BEGIN IMMEDIATE")
    await store.close()


async def test_a_reservation_of_one_migration_ends_without_that_of_another(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    await store.reserve("m1-source")
    await store.reserve("m2-source")
    store.release("m1-source")
    await store.append_journal(JournalEntry("m2", "begin", 1, {}))
    with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    await store.close()


async def test_a_reservation_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "RESERVED_MOST_S", 0.01)
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    await store.reserve("m1-source")
    await come(lambda: not store._reserved)
    await store.append_journal(JournalEntry("m1", "begin", 1, {}))
    with closing(sqlite3.connect(path, timeout=0)) as other:
        other.execute("BEGIN IMMEDIATE")
    await store.close()


async def test_a_failed_write_keeps_the_reservation(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    await store.reserve("m1-source")
    with pytest.raises(VmferryError):
        await store.append_journal(JournalEntry("m1", None, 1, {}))  # type: ignore[arg-type]
    await store.append_journal(JournalEntry("m1", "begin", 1, {}))
    with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    await store.close()


async def test_reads_wait_for_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "vmferry.db"
    store = await open_store(path)
    saved = await store.save_job(job("m1"))
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        writing = asyncio.create_task(store.save_job(job("m2")))
        await asyncio.sleep(0)
        assert await store.jobs() == [saved]
        assert await store.job("m1") == saved
        assert await store.ledger("web") == []
        assert await store.ledger_changes("", 0, 10) == []
        assert not writing.done()
        other.execute("ROLLBACK")
    await writing
    await store.close()


async def test_a_life_without_the_ledger_of_the_one_before(store: Store) -> None:
    old, new = LedgerEntry(Gpa(0x1000), Origin.VMM, count=7), LedgerEntry(Gpa(0x1000), Origin.READ)
    assert await store.life("web") == ""
    await store.record_errors("web", [old])
    await store.record_errors("db", [old])
    await store.begin_life("web", "100", keeps_ledger=True)
    assert (await store.life("web"), await store.ledger("web")) == ("100", [old])
    await store.begin_life("web", "101", keeps_ledger=False)
    assert (await store.life("web"), await store.ledger("web")) == ("101", [])
    assert await store.record_errors("web", [new]) == [new]
    await store.begin_life("web", "102", keeps_ledger=True)
    assert await store.ledger("web") == [new]
    assert [(vm, entry) for _, vm, entry in await store.ledger_changes("", 0, 10)] == [("db", old), ("web", new)]
    assert [entry for _, _, entry in await store.ledger_changes("web", 0, 10)] == [new]


async def test_a_path_may_hold_letters_of_addresses(tmp_path: Path) -> None:
    opened = await open_store(tmp_path / "a%41#b?c" / "vmferry.db")
    try:
        await opened.save_job(job("m1"))
    finally:
        await opened.close()
    assert (tmp_path / "a%41#b?c" / "vmferry.db").exists()


async def test_an_ended_migration_is_counted_once_and_forgotten(store: Store) -> None:
    ended = replace(job("m1"), phase=Phase.COMPLETED, downtime_s=0.004)
    for one in (job("m1"), ended, ended):
        await store.save_job(one)
    await store.save_incoming(Incoming("m1", "web", "a", Outcome.COMPLETED, progress=PageProgress(push=7)))
    await store.append_journal(JournalEntry("m1", "begin", 1, {}))
    await store.add_events([("m1", Event("a", 1, 5, "QUEUED")), ("m1", Event("a", 1, 5, "QUEUED"))])
    await store.forget(["m1"], [])
    assert (await store.jobs(), len(await store.journal("m1")), len(await store.events("m1"))) == ([], 1, 1)
    await store.forget([], ["m1"])
    assert (await store.journal("m1"), await store.events("m1"), await store.newest_events(9)) == ([], [], [])
    assert await store.job_revisions(0, 9) == []
    totals = await store.totals()
    assert (totals.out, totals.into, totals.pages["push"]) == ({"COMPLETED ": 1}, {"COMPLETED ": 1}, 7)
    assert totals.downtime.count == 1
