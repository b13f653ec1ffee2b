"""The words of a daemon that does not start, in the form of its log.

The module imports the standard library alone: any other library may be missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vmferry.aio.wall_clock import iso_utc, now_us

DAEMON_NOT_STARTED = "daemon.not_started"
JSON = "json"


def say(format_: str, text: str) -> None:
    """Writes one line to standard error. A line that cannot be written is lost."""
    line = f"vmferryd: {text}"
    if format_ == JSON:
        said = {"event": DAEMON_NOT_STARTED, "level": "error", "error": text, "timestamp": iso_utc(now_us())}
        line = json.dumps(said, sort_keys=True)
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def log_format(path: Path | None) -> str:
    """`log.format` of a configuration file, which may have other problems; "json" if it does not say."""
    with suppress(OSError, ValueError, RecursionError):
        if path is not None:
            log = tomllib.loads(path.read_bytes().decode()).get("log")
            if isinstance(log, dict) and log.get("format") == "console":
                return "console"
    return JSON


def config_path(argv: Sequence[str] | None) -> Path | None:
    """The file of `--config`, also among wrong arguments."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config", type=Path)
    with suppress(argparse.ArgumentError, SystemExit):
        found: Path | None = parser.parse_known_args(argv)[0].config
        return found
    return None
