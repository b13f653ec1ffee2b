"""Values of the command line: each function reads one argument or raises with the reason."""

from __future__ import annotations

import argparse
import re

from vmferry.model.names import parse_address
from vmferry.units import GIB, LSB_4K, PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST, parse_rate

NO_LIMIT = ("0", "none")
SECONDS_MOST = 31_536_000.0
"""A year: longer deadlines overflow gRPC's."""
LSB_1G = 30


API_PORT = 7600
PEER_PORT = 7601


def host_port(text: str, port: int = API_PORT) -> str:
    """An argument of the form HOST or HOST:PORT, with the port added if it is left out."""
    for candidate in (text, f"{text}:{port}", f"[{text}]:{port}"):
        if parse_address(candidate, least_port=1) is not None:
            return candidate
    raise argparse.ArgumentTypeError(f"{text!r} is not HOST or HOST:PORT")


def peer_address(text: str) -> str:
    """The peer address of a host: its name, or HOST:PORT."""
    return host_port(text, PEER_PORT)


def api_address(text: str) -> str:
    """An argument of the form HOST:PORT or unix:PATH."""
    return text if re.fullmatch(r"unix:/[^\0]+", text) else host_port(text)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= SECONDS_MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, up to {SECONDS_MOST:.0f}")
    return value


def block_bits(text: str) -> int:
    """log2 of the size of a bad block."""
    if not re.fullmatch(r"[0-9]{1,2}", text) or not LSB_4K <= int(text) <= LSB_1G:
        raise argparse.ArgumentTypeError(f"{text!r} is not from {LSB_4K} (4 KiB) to {LSB_1G} (1 GiB)")
    return int(text)


def address(text: str) -> int:
    """A guest-physical address: hexadecimal with 0x, or decimal."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address like 0x1234000")
    return value


def push_limit(text: str) -> int:
    """A rate as bytes a second, such as 200MiB/s; 0 for "none"."""
    if text in NO_LIMIT:
        return 0
    try:
        value = parse_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not PUSH_LIMIT_LEAST <= value <= PUSH_LIMIT_MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is {value} bytes a second; a limit is from {PUSH_LIMIT_LEAST}B/s (a page a second) to "
            f"{PUSH_LIMIT_MOST // GIB}GiB/s, or none"
        )
    return value
