"""Follows one migration to its end, on either of its hosts, or all migrations out of the host until Ctrl-C.

It begins with the present state.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import Api, open_api
from vmferry.client.follow import follow_incoming, follow_migrations
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
        async for migration in changes(api, migration_id):
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


async def changes(api: Api, migration_id: str) -> AsyncIterator[migrations_pb2.Migration]:
    """Yields the present state, then every change. "" is all migrations out of the host."""
    if not migration_id:
        async for migration in follow_migrations(api, from_now=True):
            yield migration
        return
    known = await api.migration(migration_id)
    if known.direction == migrations_pb2.DIRECTION_IN:
        stream = follow_incoming(api, migration_id)
    else:
        stream = follow_migrations(api, migration_id, after=max(0, known.revision - 1))
    async for migration in stream:
        yield migration


def ending(migration: migrations_pb2.Migration) -> str:
    """The last line about a migration that has ended."""
    words = f"{migration.migration_id}: {phase_word(migration)} after {duration_words(migration.total_s)}"
    if migration.downtime_s:
        words += f", downtime {duration_words(migration.downtime_s)}"
    if migration.reason_code or migration.reason:
        words += f" ({migration.reason_code}: {migration.reason})"
    return words
