"""Forgets an ended migration of the daemon's host. Counters of the metrics keep their values."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api

HELP = "forget an ended migration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        await api.delete(args.id)
    if output.as_json:
        output.event({"migration_id": args.id, "deleted": True})
    else:
        output.text(f"{args.id}: deleted")
    return ExitCode.OK
