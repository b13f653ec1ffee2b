"""Shows the events of one migration, of both hosts, in order."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.verbs.show import event_words
from vmferry.client.api import open_api
from vmferry.client.plain import plain

HELP = "show the events of a migration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migration = await api.migration(args.id)
    for event in migration.events:
        if output.as_json:
            output.event(plain(event))
        else:
            output.text(event_words(event.time, event.host, event.kind, event.words))
    return ExitCode.OK
