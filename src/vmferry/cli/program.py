"""Runs a verb and turns every end into an exit code. The operator never sees a traceback."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Sequence

from vmferry.cli.arguments import VERBS, parse
from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.refusal import ApiError, TimedOutError, UnreachableError
from vmferry.errors import VmferryError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the program `vmferry`."""
    args = parse(argv)
    output = Output(args.json)
    try:
        return int(asyncio.run(VERBS[args.verb].run(args, output)))
    except ApiError as error:
        output.refused(error)
        return exit_code(error)
    except VmferryError as error:
        output.refused(ApiError(error.reason.value, error.message, error.remedy))
        return ExitCode.REFUSED
    except (KeyboardInterrupt, asyncio.CancelledError):
        output.note("vmferry: interrupted")
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output again at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  # the last resort: a defect is told in one line
        if os.environ.get("VMFERRY_DEBUG"):
            traceback.print_exc()
        output.note(f"vmferry: defect: {type(error).__name__}: {error}")
        output.note("  VMFERRY_DEBUG=1 shows where; please report it.")
        return ExitCode.INTERNAL


def exit_code(error: ApiError) -> ExitCode:
    """The exit code of a failed call."""
    if isinstance(error, UnreachableError):
        return ExitCode.UNREACHABLE
    if isinstance(error, TimedOutError):
        return ExitCode.TIMED_OUT
    return ExitCode.REFUSED
