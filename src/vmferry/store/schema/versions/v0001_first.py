"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job_revisions",
        sa.Column("revision", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("migration", sa.String(63), nullable=False),
        sa.Column("job", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("job_revisions_by_migration", "job_revisions", ["migration", "revision"])
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("migration", sa.String(63), nullable=False, unique=True),
        sa.Column("revision", sa.Integer, sa.ForeignKey("job_revisions.revision"), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "journal",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("migration", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("journal_by_migration", "journal", ["migration", "number"])
    op.create_table(
        "incomings",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("migration", sa.String(63), nullable=False, unique=True),
        sa.Column("incoming", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "ledger",
        sa.Column("revision", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("vm", sa.String(63), nullable=False),
        sa.Column("gpa", sa.BigInteger, nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "lives",
        sa.Column("vm", sa.String(63), primary_key=True),
        sa.Column("life", sa.String(100), nullable=False),
        sa.Column("after_revision", sa.Integer, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("migration", sa.String(63), nullable=False),
        sa.Column("host", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(63), nullable=False),
        sa.Column("words", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_migration", "events", ["migration", "host", "number"], unique=True)
    op.create_table(
        "totals",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("totals", sa.Text, nullable=False),
    )
    op.create_index("ledger_by_page", "ledger", ["vm", "gpa", "revision"])
