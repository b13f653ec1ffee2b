"""Lists the migrations of the daemon's host, in both directions: problems first, then those under way, then the newest.

Without --all it shows the newest 20 of those that have ended.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import Api, open_api
from vmferry.client.follow import TERMINAL_PHASES
from vmferry.client.plain import age_words, duration_words, plain
from vmferry.client.progress import arrived, done_words, pace_words, phase_word, way_words
from vmferry.v1.migrations_pb2 import Migration

HELP = "list migrations, out of the host and into it"
COLUMNS = ("ID", "VM", "HOST", "PHASE", "DONE", "AGE")
WIDE = (*COLUMNS, "PAGES", "PACE", "WAITING", "DOWNTIME", "TOTAL", "REASON")
ENDED_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--filter",
        metavar="TERMS",
        default="",
        help="terms joined by AND, each `field = value`, over vm, phase, destination, active",
    )
    parser.add_argument("--all", action="store_true", help="all that have ended, too")


def row(migration: Migration, now_s: float, wide: bool = False) -> tuple[str, ...]:
    """One migration in the order of COLUMNS, or of WIDE. AGE is the time in its phase."""
    since = migration.phase_time.ToMicroseconds() / 1e6 if migration.HasField("phase_time") else 0.0
    short = (
        migration.migration_id,
        migration.vm,
        way_words(migration),
        phase_word(migration),
        done_words(migration),
        age_words(now_s - since) if since else "",
    )
    if not wide:
        return short
    page = migration.progress
    return (
        *short,
        f"{arrived(migration)}/{page.total}" if page.total else "",
        "" if migration.phase in TERMINAL_PHASES else pace_words(migration),
        str(page.waiting_faults or ""),
        duration_words(migration.downtime_s) if migration.downtime_s else "",
        duration_words(migration.total_s),
        migration.reason_code,
    )


async def found(api: Api, wanted: str, every: bool) -> list[Migration]:
    """The migrations in the order of the list."""
    migrations = [one async for one in api.list_migrations(wanted)] if every else await _shown(api, wanted)
    migrations += [one async for one in api.list_incoming(wanted)] if every else await _shown_incoming(api, wanted)
    return sorted(migrations, key=_order)[: None if every else _count(migrations)]


def _order(migration: Migration) -> tuple[int, float]:
    ended = migration.phase in TERMINAL_PHASES
    rank = 2 if ended else 0 if migration.reason_code else 1
    return rank, -(migration.end_time if ended else migration.create_time).ToMicroseconds()


def _count(migrations: list[Migration]) -> int:
    return sum(one.phase not in TERMINAL_PHASES for one in migrations) + ENDED_SHOWN


async def _shown(api: Api, wanted: str) -> list[Migration]:
    """Those under way, and the newest of the others: the daemon lists them in this order."""
    return await _until_enough(api.list_migrations(wanted))


async def _shown_incoming(api: Api, wanted: str) -> list[Migration]:
    return await _until_enough(api.list_incoming(wanted))


async def _until_enough(migrations: AsyncGenerator[Migration, None]) -> list[Migration]:
    kept: list[Migration] = []
    ended = 0
    async with aclosing(migrations):
        async for migration in migrations:
            ended += migration.phase in TERMINAL_PHASES
            if ended > ENDED_SHOWN:
                break
            kept.append(migration)
    return kept


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migrations = await found(api, args.filter, args.all)
    if output.as_json:
        for migration in migrations:
            output.event(plain(migration))
    elif output.form == "name":
        for migration in migrations:
            output.text(migration.migration_id)
    else:
        wide = output.form == "wide"
        rows = [row(migration, time.time(), wide) for migration in migrations]
        output.table(WIDE if wide else COLUMNS, rows, "no migrations")
    return ExitCode.OK
