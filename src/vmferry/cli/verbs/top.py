"""Shows problems and the migrations under way in both directions, until Ctrl-C; without a terminal once."""

from __future__ import annotations

import argparse
import asyncio
import time

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import seconds
from vmferry.cli.verbs import list_jobs, problems
from vmferry.client.api import Api, open_api

HELP = "show the migrations under way, live"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--every", metavar="SECONDS", type=seconds, default=1.0, help="pause between two looks (1)")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        if not output.results.is_terminal:
            output.results.print(await _picture(api), soft_wrap=True)
            return ExitCode.OK
        with Live(await _picture(api), console=output.results, screen=True) as live:
            while True:
                await asyncio.sleep(args.every)
                live.update(await _picture(api))


async def _picture(api: Api) -> RenderableType:
    found, moving = await api.list_problems(), await list_jobs.found(api, "active = true", every=True)
    now_s = time.time()
    table = Table(box=None, pad_edge=False)
    for column in list_jobs.WIDE:
        table.add_column(column, no_wrap=True)
    for migration in moving:
        table.add_row(*map(Text, list_jobs.row(migration, now_s, wide=True)))
    lines = [Text(line) for problem in found for line in problems.lines(problem, now_s)]
    return Group(Text(f"{len(moving)} under way, {len(found)} problems"), *lines, table)
