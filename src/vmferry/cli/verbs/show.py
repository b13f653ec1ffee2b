"""Shows one migration with all its fields."""

from __future__ import annotations

import argparse
from typing import Any

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.plain import plain

HELP = "show one migration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="id of the migration")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        migration = plain(await api.migration(args.id))
    if output.as_json:
        output.event(migration)
        return ExitCode.OK
    for name, value in leaves(migration):
        output.text(f"{name:28} {value}")
    return ExitCode.OK


def leaves(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Every field with a value by its dotted name."""
    found: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, dict):
            found += leaves(item, f"{prefix}{name}.")
        elif item not in (None, "", []):
            found.append((prefix + name, f"{item:g}" if isinstance(item, float) else str(item)))
    return found
