"""Moves a running guest with poisoned pages between two daemons on this machine and lets the guest judge."""

from __future__ import annotations

import argparse
import asyncio
import signal

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output

HELP = "move a poisoned guest between two daemons here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vmferry.demo.options import add_options

    add_options(parser)


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    from vmferry.demo.options import from_arguments
    from vmferry.demo.run import perform
    from vmferry.demo.screen import print_result

    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):  # As for Ctrl-C: the demo ends everything that it started.
            loop.add_signal_handler(number, task.cancel)
    options = from_arguments(args)
    result = await perform(options, output.progress, output.note if output.as_json else output.text)
    if output.as_json:
        output.event(result.plain())
    else:
        print_result(result, output.results)
    return ExitCode.OK if result.ok else ExitCode.REFUSED
