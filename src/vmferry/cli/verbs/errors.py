"""Lists a VM's memory errors. With --watch, also shows every change until interrupted."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.follow import follow_errors
from vmferry.client.plain import enum_word, plain
from vmferry.v1.common_pb2 import ErrorOrigin, Severity
from vmferry.v1.common_pb2 import MemoryError as LedgerError

HELP = "list a VM's memory errors"
COLUMNS = ("ADDRESS", "SIZE", "FOUND BY", "MACHINE CHECK", "GUEST TOLD", "MOVES", "COUNT", "LAST SEEN")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="name of the VM")
    parser.add_argument("--watch", action="store_true", help="go on with every change")


def row(error: LedgerError) -> tuple[str, ...]:
    """One memory error in the order of COLUMNS."""
    severity = "none"
    if error.severity:
        severity = enum_word(Severity.DESCRIPTOR, error.severity).lower().replace("_", " ")
    seen = datetime.fromtimestamp(error.last_seen_us / 1e6, UTC)
    return (
        f"{error.gpa:#x}",
        str(1 << error.lsb),
        enum_word(ErrorOrigin.DESCRIPTOR, error.origin).lower(),
        severity,
        "yes" if error.guest_visible else "no",
        str(error.hop),
        str(error.count),
        seen.strftime("%Y-%m-%d %H:%M:%SZ") if error.last_seen_us else "",
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        if args.watch:
            async for change in follow_errors(api, args.vm):
                if output.as_json:
                    output.event(plain(change))
                else:
                    ended = ("replaced by fresh memory",) if change.error.replaced else ()
                    output.text("  ".join((change.vm, *row(change.error), *ended)))
            return ExitCode.OK
        errors = [error async for error in api.memory_errors(args.vm)]
    if output.as_json:
        for error in errors:
            output.event(plain(error))
    else:
        output.table(COLUMNS, [row(error) for error in errors], f"{args.vm}: no memory errors")
    return ExitCode.OK
