"""Lists all that is wrong on the daemon's host now, the worst first. Exit code 1 if there is anything."""

from __future__ import annotations

import argparse
import time

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.plain import age_words, enum_word, plain
from vmferry.v1.problems_pb2 import Problem, ProblemWeight

HELP = "list what is wrong now"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the verb has only the common options."""
    del parser


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        found = await api.list_problems()
    for problem in found:
        if output.as_json:
            output.event(plain(problem))
        else:
            for line in lines(problem, time.time()):
                output.text(line)
    if not found and not output.as_json:
        output.text("nothing is wrong")
    return ExitCode.REFUSED if found else ExitCode.OK


def lines(problem: Problem, now_s: float) -> tuple[str, ...]:
    """One problem in four lines."""
    weight = enum_word(ProblemWeight.DESCRIPTOR, problem.weight)
    age = age_words(now_s - problem.start_time.ToMicroseconds() / 1e6)
    return (
        f"{weight}  {problem.effect}  (for {age})",
        f"  cause  {problem.host}: {problem.cause}  [{problem.reason_code}]",
        f"  now    {problem.command}",
        f"  see    {problem.runbook}",
    )
