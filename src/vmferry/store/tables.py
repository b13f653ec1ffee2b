"""The tables as the code uses them; `schema/versions/` makes them.

A job, an incoming migration and a ledger entry are kept as JSON of their dataclass, next to the columns that queries
need. A new field of the model with a default needs no change of the schema.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

job_revisions = Table(
    "job_revisions",
    metadata,
    Column("revision", Integer, primary_key=True, autoincrement=True),
    Column("migration", String(63), nullable=False),
    Column("job", Text, nullable=False),
    Index("job_revisions_by_migration", "migration", "revision"),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("migration", String(63), nullable=False, unique=True),
    Column("revision", Integer, ForeignKey("job_revisions.revision"), nullable=False),
    sqlite_autoincrement=True,
)
"""`number` is the order of creation. The wall clock is not: it may be set back."""

journal = Table(
    "journal",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("migration", String(63), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("data", Text, nullable=False),
    Index("journal_by_migration", "migration", "number"),
    sqlite_autoincrement=True,
)

incomings = Table(
    "incomings",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("migration", String(63), nullable=False, unique=True),
    Column("incoming", Text, nullable=False),
    sqlite_autoincrement=True,
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("migration", String(63), nullable=False),
    Column("host", String(63), nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("kind", String(63), nullable=False),
    Column("words", Text, nullable=False),
    Index("events_by_migration", "migration", "host", "number", unique=True),
    sqlite_autoincrement=True,
)
"""The course of each migration for people, of both hosts."""

totals = Table(
    "totals",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("totals", Text, nullable=False),
)
"""One row: the counts of all ended migrations, JSON of `model.totals.Totals`."""

ledger = Table(
    "ledger",
    metadata,
    Column("revision", Integer, primary_key=True, autoincrement=True),
    Column("vm", String(63), nullable=False),
    Column("gpa", BigInteger, nullable=False),
    Column("entry", Text, nullable=False),
    Index("ledger_by_page", "vm", "gpa", "revision"),
    sqlite_autoincrement=True,
)
"""Append-only: the newest row of a page is its entry."""

lives = Table(
    "lives",
    metadata,
    Column("vm", String(63), primary_key=True),
    Column("life", String(100), nullable=False),
    Column("after_revision", Integer, nullable=False),
)
"""The process that is each VM, and where its ledger begins: entries up to that revision are of an earlier life."""
