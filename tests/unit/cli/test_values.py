"""Rates of the command line, and what is said of those that are wrong."""

from __future__ import annotations

import argparse

import pytest

from vmferry.cli.values import push_limit
from vmferry.units import GIB, MIB


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("0", 0),
        ("none", 0),
        ("200MiB/s", 200 * MIB),
        ("200MiB", 200 * MIB),
        ("200 MiB/s", 200 * MIB),
        ("1.5GiB/s", 3 * GIB // 2),
        ("87.5MB/s", 87_500_000),
        ("1Gbit/s", 125_000_000),
        ("100Mbit", 12_500_000),
        ("64kbit/s", 8000),
        ("4096B/s", 4096),
        ("4KiB/s", 4096),
        ("1024GiB/s", 1024 * GIB),
        ("0.1GB/s", 100_000_000),
    ],
)
def test_rates(text: str, bytes_per_s: int) -> None:
    assert push_limit(text) == bytes_per_s


UNITS = "B, KiB, MiB, GiB, kB, MB, GB, kbit, Mbit, Gbit"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("200", f"'200' has no unit; it must be one of {UNITS}"),
        ("200/s", f"'200/s' has no unit; it must be one of {UNITS}"),
        ("200mib/s", f"'200mib/s' has the unit 'mib'; it must be one of {UNITS}"),
        ("3TiB/s", f"'3TiB/s' has the unit 'TiB'; it must be one of {UNITS}"),
        ("fast", "'fast' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("", "'' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("-1MiB/s", "'-1MiB/s' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("1e3MiB/s", "'1e3MiB/s' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("5MiB/min", "'5MiB/min' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("\u0665MiB", "'\u0665MiB' is not a rate like 200MiB/s, 1.5Gbit/s or none"),
        ("00B", "'00B' is 0 bytes a second; a limit is from 4096B/s (a page a second) to 1024GiB/s, or none"),
        ("1kbit/s", "'1kbit/s' is 125 bytes a second; a limit is from 4096B/s (a page a second) to 1024GiB/s, or none"),
        (
            "4095.9B",
            "'4095.9B' is 4095 bytes a second; a limit is from 4096B/s (a page a second) to 1024GiB/s, or none",
        ),
        (
            "1025GiB/s",
            f"'1025GiB/s' is {1025 * GIB} bytes a second; "
            "a limit is from 4096B/s (a page a second) to 1024GiB/s, or none",
        ),
    ],
)
def test_a_wrong_value_is_named(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        push_limit(text)
    assert str(caught.value) == said
