"""What the store does in its thread: plain functions over one connection, each in one transaction of the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import Connection, Select, func, select
from sqlalchemy.dialects.sqlite import insert

from vmferry.ledger.rules import merge_all
from vmferry.migration.model import Incoming, Job, LedgerEntry
from vmferry.migration.ports import JournalEntry
from vmferry.store import tables as t
from vmferry.units import Gpa

APPEND_JOURNAL = f"INSERT INTO {t.journal.name} (migration, kind, at_us, data) VALUES (?, ?, ?, ?)"


def save_job(db: Connection, job: Job) -> Job:
    row = t.job_revisions.insert().values(migration=job.migration, job=_text(job))
    revision: int = db.execute(row.returning(t.job_revisions.c.revision)).scalar_one()
    keyed = insert(t.jobs).values(migration=job.migration, created_us=job.created_us, revision=revision)
    db.execute(keyed.on_conflict_do_update(index_elements=["migration"], set_={"revision": revision}))
    return replace(job, revision=revision)


def job(db: Connection, migration: str) -> Job | None:
    found = db.execute(_newest_jobs().where(t.jobs.c.migration == migration)).first()
    return None if found is None else _job(found[0], found[1])


def jobs(db: Connection) -> list[Job]:
    rows = db.execute(_newest_jobs().order_by(t.jobs.c.created_us, t.jobs.c.migration))
    return [_job(row[0], row[1]) for row in rows]


def job_revisions(db: Connection, after: int, limit: int) -> list[Job]:
    columns = t.job_revisions.c
    wanted = select(columns.revision, columns.job).where(columns.revision > after)
    return [_job(row[0], row[1]) for row in db.execute(wanted.order_by(columns.revision).limit(limit))]


def append_journal(db: Connection, entry: JournalEntry) -> None:
    """As text for the driver: composing a statement takes longer than carrying it out, and a VM stands still."""
    data = msgspec.json.encode(entry.data).decode()
    db.exec_driver_sql(APPEND_JOURNAL, (entry.migration, entry.kind, entry.at_us, data))


def journal(db: Connection, migration: str) -> list[JournalEntry]:
    columns = t.journal.c
    wanted = select(columns.kind, columns.at_us, columns.data).where(columns.migration == migration)
    rows = db.execute(wanted.order_by(columns.number))
    return [
        JournalEntry(migration, kind, at_us, msgspec.json.decode(data, type=dict[str, object]))
        for kind, at_us, data in rows
    ]


def save_incoming(db: Connection, incoming: Incoming) -> None:
    text = _text(incoming)
    keyed = insert(t.incomings).values(migration=incoming.migration, incoming=text)
    db.execute(keyed.on_conflict_do_update(index_elements=["migration"], set_={"incoming": text}))


def incoming(db: Connection, migration: str) -> Incoming | None:
    wanted = select(t.incomings.c.incoming).where(t.incomings.c.migration == migration)
    text = db.execute(wanted).scalar()
    return None if text is None else msgspec.json.decode(text, type=Incoming)


def incomings(db: Connection) -> list[Incoming]:
    rows = db.execute(select(t.incomings.c.incoming).order_by(t.incomings.c.migration)).scalars()
    return [msgspec.json.decode(text, type=Incoming) for text in rows]


def record_errors(db: Connection, vm: str, errors: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    known = {entry.gpa: entry for entry in ledger(db, vm)}
    changed = merge_all(known, errors)
    for entry in changed.values():
        db.execute(t.ledger.insert().values(vm=vm, gpa=_signed(entry.gpa), entry=_text(entry)))
    return list(changed.values())


def ledger(db: Connection, vm: str) -> list[LedgerEntry]:
    columns = t.ledger.c
    newest = select(func.max(columns.revision)).where(columns.vm == vm).group_by(columns.gpa)
    rows = db.execute(select(columns.entry).where(columns.revision.in_(newest))).scalars()
    return sorted((_entry(text) for text in rows), key=lambda entry: entry.gpa)


def ledger_changes(db: Connection, vm: str, after: int, limit: int) -> list[tuple[int, str, LedgerEntry]]:
    columns = t.ledger.c
    wanted = select(columns.revision, columns.vm, columns.entry).where(columns.revision > after)
    if vm:
        wanted = wanted.where(columns.vm == vm)
    rows = db.execute(wanted.order_by(columns.revision).limit(limit))
    return [(revision, name, _entry(text)) for revision, name, text in rows]


def _newest_jobs() -> Select[int, str]:
    joined = t.jobs.join(t.job_revisions, t.jobs.c.revision == t.job_revisions.c.revision)
    return select(t.job_revisions.c.revision, t.job_revisions.c.job).select_from(joined)


def _text(value: Job | Incoming | LedgerEntry) -> str:
    return msgspec.json.encode(value).decode()


def _job(revision: int, text: str) -> Job:
    return replace(msgspec.json.decode(text, type=Job), revision=revision)


def _entry(text: str) -> LedgerEntry:
    return msgspec.json.decode(text, type=LedgerEntry)


def _signed(gpa: Gpa) -> int:
    """SQLite's integers are signed: a GPA of 2^63 and above is kept as its two's complement."""
    return gpa - (1 << 64) if gpa >= 1 << 63 else gpa
