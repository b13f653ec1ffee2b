"""The statements of the store: plain functions over one connection, each in a transaction of its caller.

Each statement is composed once, here, because composing takes longer than executing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import Connection, bindparam, func, select
from sqlalchemy.dialects.sqlite import insert

from vmferry.ledger.merge import merge_all
from vmferry.model.facts import Event
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import TERMINAL, Incoming, Job
from vmferry.model.totals import Totals
from vmferry.store import tables as t
from vmferry.units import Gpa

_REVISIONS, _JOURNAL, _LEDGER = t.job_revisions.c, t.journal.c, t.ledger.c

_ADD_REVISION = t.job_revisions.insert().returning(_REVISIONS.revision)
_JOBS = insert(t.jobs)
_KEEP_JOB = _JOBS.on_conflict_do_update(index_elements=["migration"], set_={"revision": _JOBS.excluded.revision})
_NEWEST_JOBS = select(_REVISIONS.revision, _REVISIONS.job).select_from(
    t.jobs.join(t.job_revisions, t.jobs.c.revision == _REVISIONS.revision)
)
_JOB = _NEWEST_JOBS.where(t.jobs.c.migration == bindparam("migration"))
_ALL_JOBS = _NEWEST_JOBS.order_by(t.jobs.c.number)
_JOB_REVISIONS = (
    select(_REVISIONS.revision, _REVISIONS.job)
    .where(_REVISIONS.revision > bindparam("after"))
    .order_by(_REVISIONS.revision)
    .limit(bindparam("limit"))
)

_APPEND_JOURNAL = f"INSERT INTO {t.journal.name} (migration, kind, at_us, data) VALUES (?, ?, ?, ?)"
_READ_JOURNAL = (
    select(_JOURNAL.kind, _JOURNAL.at_us, _JOURNAL.data)
    .where(_JOURNAL.migration == bindparam("migration"))
    .order_by(_JOURNAL.number)
)

_INCOMING_JOURNALS = (
    select(_JOURNAL.migration, _JOURNAL.kind, _JOURNAL.at_us, _JOURNAL.data)
    .where(_JOURNAL.migration.in_(select(t.incomings.c.migration)))
    .order_by(_JOURNAL.number)
)

_INCOMINGS = insert(t.incomings)
_KEEP_INCOMING = _INCOMINGS.on_conflict_do_update(
    index_elements=["migration"], set_={"incoming": _INCOMINGS.excluded.incoming}
)
_INCOMING = select(t.incomings.c.incoming).where(t.incomings.c.migration == bindparam("migration"))
_ALL_INCOMINGS = select(t.incomings.c.incoming).order_by(t.incomings.c.number)

_EVENTS = t.events.c
_ADD_EVENT = insert(t.events).on_conflict_do_nothing(index_elements=["migration", "host", "number"])
_EVENT = (_EVENTS.host, _EVENTS.number, _EVENTS.at_us, _EVENTS.kind, _EVENTS.words)
_OF_MIGRATION = select(*_EVENT).where(_EVENTS.migration == bindparam("migration")).order_by(_EVENTS.id)
_NEWEST_EVENTS = select(_EVENTS.migration, *_EVENT).order_by(_EVENTS.id.desc()).limit(bindparam("limit"))
_TOTALS = insert(t.totals)
_KEEP_TOTALS = _TOTALS.on_conflict_do_update(index_elements=["name"], set_={"totals": _TOTALS.excluded.totals})
_READ_TOTALS = select(t.totals.c.totals)

_LIVES = insert(t.lives)
_KEEP_LIFE = _LIVES.on_conflict_do_update(
    index_elements=["vm"],
    set_={"life": _LIVES.excluded.life, "after_revision": _LIVES.excluded.after_revision},
)
_LIFE = select(t.lives.c.life, t.lives.c.after_revision).where(t.lives.c.vm == bindparam("vm"))
_LAST_ERROR = select(func.coalesce(func.max(_LEDGER.revision), 0))

_ADD_ERROR = t.ledger.insert()
_BEGINS = func.coalesce(select(t.lives.c.after_revision).where(t.lives.c.vm == bindparam("vm")).scalar_subquery(), 0)
_NEWEST_ERRORS = (
    select(func.max(_LEDGER.revision))
    .where(_LEDGER.vm == bindparam("vm"), _LEDGER.revision > _BEGINS)
    .group_by(_LEDGER.gpa)
)
_ERRORS = select(_LEDGER.entry).where(_LEDGER.revision.in_(_NEWEST_ERRORS))
_ERROR = (
    select(_LEDGER.entry)
    .where(_LEDGER.vm == bindparam("vm"), _LEDGER.gpa == bindparam("gpa"), _LEDGER.revision > _BEGINS)
    .order_by(_LEDGER.revision.desc())
    .limit(1)
)
_ANY_CHANGES = (
    select(_LEDGER.revision, _LEDGER.vm, _LEDGER.entry)
    .outerjoin(t.lives, t.lives.c.vm == _LEDGER.vm)
    .where(_LEDGER.revision > bindparam("after"), _LEDGER.revision > func.coalesce(t.lives.c.after_revision, 0))
    .order_by(_LEDGER.revision)
    .limit(bindparam("limit"))
)
_CHANGES = _ANY_CHANGES.where(_LEDGER.vm == bindparam("vm"))


def save_job(db: Connection, job: Job) -> Job:
    """An ended job is counted with the write that ends it."""
    if job.phase in TERMINAL:
        before = db.execute(_JOB, {"migration": job.migration}).first()
        if before is None or _job(before[0], before[1]).phase not in TERMINAL:
            _keep_totals(db, totals(db).with_job(job))
    row = {"migration": job.migration, "job": _text(job)}
    revision: int = db.execute(_ADD_REVISION, row).scalar_one()
    db.execute(_KEEP_JOB, {"migration": job.migration, "revision": revision})
    return replace(job, revision=revision)


def job(db: Connection, migration: str) -> Job | None:
    found = db.execute(_JOB, {"migration": migration}).first()
    return None if found is None else _job(found[0], found[1])


def jobs(db: Connection) -> list[Job]:
    return [_job(row[0], row[1]) for row in db.execute(_ALL_JOBS)]


def job_revisions(db: Connection, after: int, limit: int) -> list[Job]:
    rows = db.execute(_JOB_REVISIONS, {"after": after, "limit": limit})
    return [_job(row[0], row[1]) for row in rows]


def show_writable(db: Connection) -> None:
    """Changes one page, and so shows that the disk takes a write."""
    number: int = db.exec_driver_sql("PRAGMA user_version").scalar_one()
    db.exec_driver_sql(f"PRAGMA user_version = {(number + 1) % (1 << 31)}")


def append_journal(db: Connection, entry: JournalEntry) -> None:
    """Text for the driver: the quickest way, because this write is part of the blackout."""
    data = msgspec.json.encode(entry.data).decode()
    db.exec_driver_sql(_APPEND_JOURNAL, (entry.migration, entry.kind, entry.at_us, data))


def append_missing(db: Connection, entries: Sequence[JournalEntry]) -> None:
    """Appends the entries that the journal does not have yet."""
    for entry in entries:
        if entry not in journal(db, entry.migration):
            append_journal(db, entry)


def journal(db: Connection, migration: str) -> list[JournalEntry]:
    return [
        JournalEntry(migration, kind, at_us, msgspec.json.decode(data, type=dict[str, object]))
        for kind, at_us, data in db.execute(_READ_JOURNAL, {"migration": migration})
    ]


def incoming_journals(db: Connection) -> dict[str, list[JournalEntry]]:
    found: dict[str, list[JournalEntry]] = {}
    for migration, kind, at_us, data in db.execute(_INCOMING_JOURNALS):
        entry = JournalEntry(migration, kind, at_us, msgspec.json.decode(data, type=dict[str, object]))
        found.setdefault(migration, []).append(entry)
    return found


def save_incoming(db: Connection, incoming: Incoming) -> None:
    """An ended one is counted with the write that ends it."""
    if incoming.ended and incoming.vm:
        before = _incoming(db, incoming.migration)
        if before is None or not before.ended:
            _keep_totals(db, totals(db).with_incoming(incoming))
    db.execute(_KEEP_INCOMING, {"migration": incoming.migration, "incoming": _text(incoming)})


def totals(db: Connection) -> Totals:
    text = db.execute(_READ_TOTALS).scalar()
    return Totals() if text is None else msgspec.json.decode(text, type=Totals)


def _keep_totals(db: Connection, kept: Totals) -> None:
    db.execute(_KEEP_TOTALS, {"name": "all", "totals": _text(kept)})


def add_events(db: Connection, events: Sequence[tuple[str, Event]]) -> None:
    for migration, one in events:
        row = {"migration": migration, "host": one.host, "number": one.number}
        db.execute(_ADD_EVENT, {**row, "at_us": one.at_us, "kind": one.kind, "words": one.words})


def events(db: Connection, migration: str) -> list[Event]:
    return [Event(*row) for row in db.execute(_OF_MIGRATION, {"migration": migration})]


def newest_events(db: Connection, limit: int) -> list[tuple[str, Event]]:
    return [(row[0], Event(*row[1:])) for row in db.execute(_NEWEST_EVENTS, {"limit": limit})]


def forget(db: Connection, jobs: Sequence[str], incomings: Sequence[str]) -> None:
    """Deletes jobs and incoming migrations. Journal and events go with the last of one id."""
    for migration in jobs:
        db.execute(t.jobs.delete().where(t.jobs.c.migration == migration))
        db.execute(t.job_revisions.delete().where(_REVISIONS.migration == migration))
    for migration in incomings:
        db.execute(t.incomings.delete().where(t.incomings.c.migration == migration))
    for migration in {*jobs, *incomings}:
        if job(db, migration) is None and _incoming(db, migration) is None:
            db.execute(t.journal.delete().where(_JOURNAL.migration == migration))
            db.execute(t.events.delete().where(_EVENTS.migration == migration))


def incoming(db: Connection, migration: str) -> Incoming | None:
    return _incoming(db, migration)


def _incoming(db: Connection, migration: str) -> Incoming | None:
    text = db.execute(_INCOMING, {"migration": migration}).scalar()
    return None if text is None else msgspec.json.decode(text, type=Incoming)


def incomings(db: Connection) -> list[Incoming]:
    return [msgspec.json.decode(text, type=Incoming) for text in db.execute(_ALL_INCOMINGS).scalars()]


def record_errors(db: Connection, vm: str, errors: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    known: dict[Gpa, LedgerEntry] = {}
    for gpa in {entry.gpa for entry in errors}:
        text = db.execute(_ERROR, {"vm": vm, "gpa": _signed(gpa)}).scalar()
        if text is not None:
            known[gpa] = _entry(text)
    changed = merge_all(known, errors)
    for entry in changed.values():
        db.execute(_ADD_ERROR, {"vm": vm, "gpa": _signed(entry.gpa), "entry": _text(entry)})
    return list(changed.values())


def ledger(db: Connection, vm: str) -> list[LedgerEntry]:
    rows = db.execute(_ERRORS, {"vm": vm}).scalars()
    return sorted((_entry(text) for text in rows), key=lambda entry: entry.gpa)


def ledger_changes(db: Connection, vm: str, after: int, limit: int) -> list[tuple[int, str, LedgerEntry]]:
    values = {"after": after, "limit": limit}
    rows = db.execute(_CHANGES, {**values, "vm": vm}) if vm else db.execute(_ANY_CHANGES, values)
    return [(revision, name, _entry(text)) for revision, name, text in rows]


def life(db: Connection, vm: str) -> str:
    return db.execute(_LIFE, {"vm": vm}).scalar() or ""


def begin_life(db: Connection, vm: str, life: str, keeps_ledger: bool) -> None:
    known = db.execute(_LIFE, {"vm": vm}).first()
    kept: int = 0 if known is None else known[1]
    after = kept if keeps_ledger else db.execute(_LAST_ERROR).scalar_one()
    db.execute(_KEEP_LIFE, {"vm": vm, "life": life, "after_revision": after})


def _text(value: Job | Incoming | LedgerEntry | Totals) -> str:
    return msgspec.json.encode(value).decode()


def _job(revision: int, text: str) -> Job:
    return replace(msgspec.json.decode(text, type=Job), revision=revision)


def _entry(text: str) -> LedgerEntry:
    return msgspec.json.decode(text, type=LedgerEntry)


def _signed(gpa: Gpa) -> int:
    """SQLite's integers are signed: a GPA of 2^63 or more is kept as its two's complement."""
    return gpa - (1 << 64) if gpa >= 1 << 63 else gpa
