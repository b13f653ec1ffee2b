"""Waits until a migration reaches a phase, or ends. Exit code 1 if it ends otherwise, 4 after --within."""

from __future__ import annotations

import argparse
import asyncio

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import seconds
from vmferry.cli.verbs.watch import changes
from vmferry.client.api import Api, open_api
from vmferry.client.follow import TERMINAL_PHASES
from vmferry.client.progress import phase_word

HELP = "wait until a migration reaches a phase"
PHASES = ("preparing", "switchover", "postcopy", "completed", "ended")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")
    parser.add_argument(
        "--for", dest="wanted", choices=PHASES, default="completed", help="phase, or a later one (completed)"
    )
    parser.add_argument("--within", metavar="SECONDS", type=seconds, help="give up after this time")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        try:
            async with asyncio.timeout(args.within):
                return await _reached(api, args, output)
        except TimeoutError:
            output.note(f"vmferry: {args.id} is not {args.wanted} after {args.within:g} s")
            return ExitCode.TIMED_OUT


async def _reached(api: Api, args: argparse.Namespace, output: Output) -> ExitCode:
    async for migration in changes(api, args.id):
        phase = phase_word(migration)
        ended = migration.phase in TERMINAL_PHASES
        if ended or _has_passed(phase, args.wanted):
            output.text(f"{migration.migration_id}: {phase}")
            good = phase == "COMPLETED" or args.wanted == "ended" or not ended
            return ExitCode.OK if good else ExitCode.REFUSED
    return ExitCode.REFUSED


def _has_passed(phase: str, wanted: str) -> bool:
    order = ("QUEUED", "PREPARING", "SWITCHOVER", "POSTCOPY", "COMPLETED")
    known = "POSTCOPY" if phase == "POSTCOPY_PAUSED" else phase
    return wanted != "ended" and known in order and order.index(known) >= order.index(wanted.upper())
