"""The command line: global options, before or after the verb, and the verbs."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from types import ModuleType
from typing import NoReturn

from vmferry.cli.values import api_address, seconds
from vmferry.cli.verbs import (
    adopt,
    cancel,
    completion,
    delete,
    demo,
    doctor,
    errors,
    events,
    list_jobs,
    machines,
    migrate,
    pki,
    problems,
    push_limit,
    qemu,
    report_error,
    show,
    top,
    wait,
    watch,
)

VERBS: Mapping[str, ModuleType] = {
    "migrate": migrate,
    "watch": watch,
    "wait": wait,
    "list": list_jobs,
    "show": show,
    "events": events,
    "top": top,
    "problems": problems,
    "delete": delete,
    "cancel": cancel,
    "push-limit": push_limit,
    "errors": errors,
    "report-error": report_error,
    "machines": machines,
    "adopt": adopt,
    "qemu": qemu,
    "doctor": doctor,
    "pki": pki,
    "demo": demo,
    "completion": completion,
}
"""Each module has `HELP`, `add_arguments(parser)` and `async run(args, output) -> ExitCode`."""

DEFAULT_API = "127.0.0.1:7600"
DEFAULT_TIMEOUT_S = 10.0


def parser(environment: Mapping[str, str] = os.environ) -> argparse.ArgumentParser:
    """The whole command line. The environment's `VMFERRY_API` is the default of --api."""
    top = Parser(
        prog="vmferry",
        description="Moves running virtual machines with their memory errors.",
        epilog="Examples: vmferry migrate web-1 --to host-b --watch; vmferry problems; vmferry show ID",
    )
    top.add_argument("--version", action="version", version=f"vmferry {version()}")
    _add_global(top)
    top.set_defaults(
        api=None, json=False, form="", timeout=DEFAULT_TIMEOUT_S, api_default=environment.get("VMFERRY_API")
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        _add_global(verb)
        module.add_arguments(verb)
    return top


class Parser(argparse.ArgumentParser):
    """A parser that suggests what a mistyped word may mean. Its errors end the program with status 2."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found is not None:
            near = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), 1)
            message = f"{found[1]!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else f"; known: {found[2]}")
        super().error(message)


def version() -> str:
    """The version of the installed package."""
    try:
        return package_version("vmferry")
    except PackageNotFoundError:  # A source tree is not installed.
        return "0+source"


def _add_global(to: argparse.ArgumentParser) -> None:
    """Adds the options to a parser. SUPPRESS keeps the verb's parser from resetting options before the verb."""
    group = to.add_argument_group("options of every verb")
    none = argparse.SUPPRESS
    group.add_argument(
        "--api",
        metavar="ADDRESS",
        type=api_address,
        default=none,
        help=f"the daemon, HOST:PORT or unix:PATH (VMFERRY_API, {DEFAULT_API})",
    )
    group.add_argument("--json", action="store_true", default=none, help="one JSON object a line on standard output")
    group.add_argument(
        "-o",
        "--output",
        dest="form",
        choices=("json", "wide", "name"),
        default=none,
        help="form of a list: json (as --json), wide (more columns), name (ids alone)",
    )
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=none,
        help=f"deadline of a call to the daemon ({DEFAULT_TIMEOUT_S:.0f})",
    )


def parse(argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """Reads the command line. On an error it ends the program with status 2, as argparse does."""
    top = parser(environment)
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        if not word.isprintable() and any(0xDC80 <= ord(letter) <= 0xDCFF for letter in word):
            top.error(f"an argument is not UTF-8: {word.encode(errors='surrogateescape')!r}")
    args = top.parse_args(words)
    args.json = args.json or args.form == "json"
    if args.api is None:
        try:
            args.api = api_address(args.api_default or DEFAULT_API)
        except argparse.ArgumentTypeError as error:
            top.error(f"VMFERRY_API: {error}")
    return args
