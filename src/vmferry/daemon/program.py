"""The program `vmferryd`: arguments, configuration, lock, exit codes (docs/reference/configuration.md lists them)."""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import sys
from collections.abc import Sequence
from enum import IntEnum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

import structlog

from vmferry.daemon import log
from vmferry.daemon.app import Daemon
from vmferry.daemon.config import Config, ConfigError, load
from vmferry.daemon.core import Assemble
from vmferry.daemon.instance import HostUnfit, InstanceLock, make_directory
from vmferry.daemon.last_words import log_format, say
from vmferry.errors import VmferryError
from vmferry.model.names import HOST_NAME

SWITCH_S = 0.001
"""A thread that renders or decodes gives the event loop its turn after this time: Python's default is 5 ms."""


class Exit(IntEnum):
    """The exit codes of `vmferryd`."""

    STOPPED = 0
    FAULT = 1
    USAGE = 2
    CONFIG = 3
    HOST = 4


def run(argv: Sequence[str] | None, assemble: Assemble) -> Exit:
    """Runs the program with the parts that `assemble` makes."""
    arguments = _parser().parse_args(argv)
    # A check is for people, or for a unit that shows its lines as they are.
    format_ = "console" if arguments.check_config else log_format(arguments.config)
    try:
        config = load(arguments.config, default_host())
    except OSError as error:
        say(format_, f"{arguments.config} cannot be read: {error.strerror}. Name a readable TOML file with --config.")
        return Exit.CONFIG
    except ConfigError as error:
        for problem in error.problems:
            say(format_, f"{arguments.config}: {problem}")
        return Exit.CONFIG
    if arguments.check_config:
        sys.stdout.write(f"{arguments.config}: good\n")
        return Exit.STOPPED
    return _run_daemon(config, assemble)


def _run_daemon(config: Config, assemble: Assemble) -> Exit:
    log.configure(config.log.format, config.log.level, config.host)
    try:
        make_directory(config.runtime_dir, "runtime_dir", 0o700)
        make_directory(config.state_dir, "state_dir", 0o700)
        lock = InstanceLock(config.state_dir)
    except HostUnfit as error:
        say(config.log.format, str(error))
        return Exit.HOST
    sys.setswitchinterval(SWITCH_S)
    try:
        asyncio.run(_daemon(config, assemble))
    except (HostUnfit, VmferryError) as error:
        say(config.log.format, str(error))
        return Exit.HOST
    except Exception:  # noqa: BLE001 - the edge of the process: logged, and told by the exit code
        structlog.stdlib.get_logger().exception(log.DAEMON_FAILED)
        return Exit.FAULT
    finally:
        lock.release()
    return Exit.STOPPED


async def _daemon(config: Config, assemble: Assemble) -> None:
    await Daemon(config, assemble, version()).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vmferryd", description="Moves running virtual machines between hosts.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML; see configs/vmferryd.toml")
    parser.add_argument("--check-config", action="store_true", help="check FILE, start nothing")
    parser.add_argument("--version", action="version", version=f"vmferryd {version()}")
    return parser


def version() -> str:
    try:
        return package_version("vmferry")
    except PackageNotFoundError:  # A source tree is not installed.
        return "0+source"


def default_host() -> str:
    """The machine's host name in the form that `host` requires."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63]
    return name if re.fullmatch(HOST_NAME, name) else "localhost"
