"""Cancels a migration, until the commit of its switchover. The VM stays on its source and keeps running."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.plain import plain
from vmferry.client.progress import phase_word

HELP = "cancel a migration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migration = await api.cancel(args.id)
    if output.as_json:
        output.event(plain(migration))
    else:
        output.text(f"{migration.migration_id}: {phase_word(migration)}")
    return ExitCode.OK
