"""Finds the programs of the wheel."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from vmferry.errors import Reason, VmferryError

DIRECTORY_VARIABLE = "VMFERRY_PROGRAMS"
"""The directory to search first, for programs that were built and not installed."""


class ProgramMissingError(VmferryError):
    """A program of vmferry is missing."""


def find_program(name: str) -> Path:
    """The program in $VMFERRY_PROGRAMS, next to this interpreter, or on PATH.

    Raises:
        ProgramMissingError: names the searched places.
    """
    given = os.environ.get(DIRECTORY_VARIABLE)
    places = [Path(given)] if given else []
    places.append(Path(sys.executable).parent)
    for place in places:
        candidate = place / name
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path)
    looked = ", ".join(map(str, places))
    raise ProgramMissingError(
        Reason.INTERNAL, f"{name} is neither in {looked} nor on PATH.", "Install the wheel: `make setup`."
    )


def daemon_command() -> list[str]:
    """The command of a daemon: the installed program, or the package of this interpreter."""
    try:
        return [str(find_program("vmferryd"))]
    except ProgramMissingError:
        return [sys.executable, "-c", "import sys; from vmferry.daemon import main; sys.exit(main())"]
