"""Lists the migrations that the daemon knows, running and past."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.plain import duration_words, plain
from vmferry.client.progress import arrived, phase_word
from vmferry.v1.migrations_pb2 import Migration

HELP = "list migrations"
COLUMNS = ("ID", "VM", "TO", "PHASE", "PAGES", "DOWNTIME", "TOTAL", "REASON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--filter",
        metavar="TERMS",
        default="",
        help="terms joined by AND, each `field = value`, over vm, phase, destination, active",
    )


def row(migration: Migration) -> tuple[str, ...]:
    """One migration in the order of COLUMNS."""
    total = migration.progress.total
    return (
        migration.migration_id,
        migration.vm,
        migration.destination,
        phase_word(migration),
        f"{arrived(migration)}/{total}" if total else "",
        duration_words(migration.downtime_s) if migration.downtime_s else "",
        duration_words(migration.total_s),
        migration.reason_code,
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    rows = []
    async with open_api(args.api, args.timeout) as api:
        async for migration in api.list_migrations(args.filter):
            if output.as_json:
                output.event(plain(migration))
            rows.append(row(migration))
    if not output.as_json:
        output.table(COLUMNS, rows, "no migrations")
    return ExitCode.OK
