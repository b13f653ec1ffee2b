"""Follows one migration to its end, or all migrations of the daemon until interrupted."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import Api, open_api
from vmferry.client.follow import follow_migrations
from vmferry.client.plain import duration_words, plain
from vmferry.client.progress import ProgressView, phase_word
from vmferry.v1 import migrations_pb2

HELP = "follow a migration, or all of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", nargs="?", default="", help="id of the migration; none: all")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        return await follow(api, args.id, output)


async def follow(api: Api, migration_id: str, output: Output) -> ExitCode:
    """Shows every change. The exit code tells whether the migration completed."""
    last: migrations_pb2.Migration | None = None
    with ProgressView(output.progress) as view:
        async for migration in follow_migrations(api, migration_id):
            last = migration
            if output.as_json:
                output.event(plain(migration))
            else:
                view.show(migration)
    if last is None:  # A stream without any change ends only this way.
        return ExitCode.REFUSED
    if not output.as_json:
        output.text(ending(last))
    return ExitCode.OK if last.phase == migrations_pb2.PHASE_COMPLETED else ExitCode.REFUSED


def ending(migration: migrations_pb2.Migration) -> str:
    """The last line about a migration that has ended."""
    words = f"{migration.migration_id}: {phase_word(migration)} after {duration_words(migration.total_s)}"
    if migration.downtime_s:
        words += f", downtime {duration_words(migration.downtime_s)}"
    if migration.reason_code or migration.reason:
        words += f" ({migration.reason_code}: {migration.reason})"
    return words
