"""The exit codes of `vmferry`. A test compares them with docs/reference/cli.md."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit status of every verb."""

    OK = 0
    REFUSED = 1
    """The daemon refused the call, the watched migration did not complete, or a check failed."""
    USAGE = 2
    UNREACHABLE = 3
    TIMED_OUT = 4
    INTERNAL = 70
    """A defect of vmferry (EX_SOFTWARE of sysexits.h)."""
    INTERRUPTED = 130
    """Ctrl-C: 128 + SIGINT."""
    BROKEN_PIPE = 141
    """The reader of the output closed it: 128 + SIGPIPE."""
