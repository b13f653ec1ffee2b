"""The command line: global options, before or after the verb, and the verbs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from types import ModuleType

from vmferry.cli.values import api_address, seconds
from vmferry.cli.verbs import (
    adopt,
    cancel,
    demo,
    doctor,
    errors,
    list_jobs,
    machines,
    migrate,
    pki,
    push_limit,
    qemu,
    report_error,
    show,
    watch,
)

VERBS: Mapping[str, ModuleType] = {
    "migrate": migrate,
    "watch": watch,
    "list": list_jobs,
    "show": show,
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
}
"""Each module has `HELP`, `add_arguments(parser)` and `async run(args, output) -> ExitCode`."""

DEFAULT_API = "127.0.0.1:7600"
DEFAULT_TIMEOUT_S = 10.0


def parser(environment: Mapping[str, str] = os.environ) -> argparse.ArgumentParser:
    """The whole command line. The environment's `VMFERRY_API` is the default of --api."""
    top = argparse.ArgumentParser(
        prog="vmferry", description="Moves running virtual machines with their memory errors."
    )
    _add_global(top)
    top.set_defaults(api=None, json=False, timeout=DEFAULT_TIMEOUT_S, api_default=environment.get("VMFERRY_API"))
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.__doc__)
        _add_global(verb)
        module.add_arguments(verb)
    return top


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
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=none,
        help=f"deadline of a call to the daemon ({DEFAULT_TIMEOUT_S:.0f})",
    )


def parse(argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> argparse.Namespace:
    """Reads the command line. On an error it ends the program with status 2, as argparse does."""
    top = parser(environment)
    args = top.parse_args(argv)
    if args.api is None:
        try:
            args.api = api_address(args.api_default or DEFAULT_API)
        except argparse.ArgumentTypeError as error:
            top.error(f"VMFERRY_API: {error}")
    return args
