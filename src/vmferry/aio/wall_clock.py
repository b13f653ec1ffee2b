"""The wall clock, for people: no decision rests on it. A host's clock may say anything, and no reading of it raises."""

from __future__ import annotations

import time
from datetime import UTC, datetime

EARLIEST_US = 1
"""0 stands for "not yet". Linux sets no clock before 1970 or beyond 2232 (timespec64_valid_settod, linux/time64.h)."""
LATEST_US = 9_223_372_036_000_000
"""CPython reads no clock beyond the year 2262: its nanoseconds have 63 bits."""


def now_us() -> int:
    """Unix microseconds. A clock beyond the limits reads as the nearer one."""
    try:
        now = time.time_ns() // 1000
    except OverflowError:
        return LATEST_US
    return min(max(now, EARLIEST_US), LATEST_US)


def iso_utc(at_us: int) -> str:
    """The time as in `2026-01-31T12:00:00.000001Z`."""
    seconds, microseconds = divmod(at_us, 1_000_000)
    shown = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)
    return shown.isoformat(timespec="microseconds").replace("+00:00", "Z")
