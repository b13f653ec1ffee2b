"""Changes the limit of the background push of a running migration. Demand is never delayed."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import push_limit
from vmferry.client.api import open_api
from vmferry.client.plain import limit_words, plain
from vmferry.client.progress import phase_word

HELP = "limit the background push of a migration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")
    parser.add_argument("limit", metavar="RATE", type=push_limit, help="such as 200MiB/s or 1.5Gbit/s; none: no limit")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migration = await api.set_push_limit(args.id, args.limit)
    if output.as_json:
        output.event(plain(migration))
    else:
        words = limit_words(migration.push_bytes_per_s)
        output.text(f"{migration.migration_id}: {phase_word(migration)}, push limit {words}")
    return ExitCode.OK
