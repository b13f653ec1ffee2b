"""Values of the command line: each reads one argument or says what is wrong with it."""

from __future__ import annotations

import argparse
import re

_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\[\]\s/]+):(\d{1,5})")


def host_port(text: str) -> str:
    """An argument of the form HOST:PORT."""
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def address(text: str) -> int:
    """A guest-physical address: hexadecimal with 0x, or decimal."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like 0x1234000")
    return value
