"""Tries the abilities that this host needs, and names a remedy for each that is missing."""

from __future__ import annotations

import argparse

from rich.table import Table

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.probe.checks import run_all
from vmferry.cli.probe.finding import Finding, State

HELP = "check what this host can do"
_STYLE = {State.OK: "green", State.WARN: "yellow", State.MISSING: "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the verb has only the common options."""
    del parser


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    del args
    findings = run_all()
    missing = [finding for finding in findings if finding.state is State.MISSING]
    if output.as_json:
        for finding in findings:
            output.event(finding.plain())
    else:
        _print(findings, output)
        output.text(f"{len(missing)} missing" if missing else "everything that is needed is there")
    return ExitCode.REFUSED if missing else ExitCode.OK


def _print(findings: list[Finding], output: Output) -> None:
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        style = _STYLE[finding.state]
        table.add_row(f"[{style}]{finding.state}[/{style}]", finding.name, finding.seen)
        if finding.todo:
            table.add_row("", "", f"[dim]→ {finding.todo}[/dim]")
    output.results.print(table)
