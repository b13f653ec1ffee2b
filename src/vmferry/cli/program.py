"""Runs a verb and turns every end into an exit code. The operator never sees a traceback."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from vmferry.cli.arguments import VERBS, parse
from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.refusal import ApiError, TimedOutError, UnreachableError
from vmferry.errors import VmferryError

FOLLOWED = "; a migration continues in its daemons: vmferry list shows it"


def main(argv: Sequence[str] | None = None) -> int:  # noqa: PLR0911 one for each end
    """Entry point of the program `vmferry`."""
    if sys.stdout is None:
        return ExitCode.BROKEN_PIPE
    args = parse(argv)
    output = Output(args.json, form=args.form)
    try:
        return int(asyncio.run(VERBS[args.verb].run(args, output)))
    except ApiError as error:
        output.refused(error)
        return exit_code(error)
    except VmferryError as error:
        output.refused(ApiError(error.reason.value, error.message, error.remedy))
        return ExitCode.REFUSED
    except (KeyboardInterrupt, asyncio.CancelledError):
        output.note("vmferry: interrupted" + (FOLLOWED if args.verb in ("watch", "wait", "migrate") else ""))
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output again at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            return _defect(error, output)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        output.note(f"vmferry: the output cannot be written: {error.strerror}")
        return ExitCode.REFUSED
    except Exception as error:  # noqa: BLE001  # the last resort: a defect is told in one line
        return _defect(error, output)


def _defect(error: Exception, output: Output) -> ExitCode:
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
