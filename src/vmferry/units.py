"""Addresses and sizes. Address types never mix, ranges are half-open, sizes are bytes."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NewType

Gpa = NewType("Gpa", int)
"""Guest-physical address, bytes."""

Hva = NewType("Hva", int)
"""Host-virtual address in the VMM, bytes."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

PAGE_4K = 4 * KIB
PAGE_2M = 2 * MIB
PAGE_1G = GIB

PUSH_LIMIT_LEAST = PAGE_4K
PUSH_LIMIT_MOST = 1024 * GIB
"""The range of a push limit, bytes per second: from one page to 1 TiB."""

LSB_4K = 12
"""log2 of a 4 KiB page: `addr_lsb` of a machine check (Intel SDM vol. 3B, 17.3.2.4)."""

_RATE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([A-Za-z]*)(/s)?", re.ASCII)
RATE_UNITS = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "kbit": 125,
    "Mbit": 125 * 1000,
    "Gbit": 125 * 1000**2,
}
"""The bytes of one unit."""


def parse_rate(text: str) -> int:
    """A rate such as 200MiB/s or 1.5Gbit/s, as bytes a second. Raises: ValueError, with the units."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate like 200MiB/s, 1.5Gbit/s or none")
    unit = match[2]
    if unit not in RATE_UNITS:
        said = f"has the unit {unit!r}" if unit else "has no unit"
        raise ValueError(f"{text!r} {said}; it must be one of {', '.join(RATE_UNITS)}")
    return int(Decimal(match[1]) * RATE_UNITS[unit])
