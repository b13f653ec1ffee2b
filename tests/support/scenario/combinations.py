"""Combinations of a move: every accelerator and backing meets every way to go bad; workloads rotate."""

from __future__ import annotations

from itertools import product

from vmferry.demo.options import WORKLOADS
from vmferry.units import PAGE_2M, PAGE_4K

ACCELS = ("kvm", "process")
BACKINGS = ("anonymous", "memfd")
WAYS = ("clean", "known", "unknown", "during", "afterwards")

SLOW = ("idle", "paced", "paced", "idle")
"""A guest that is quick stumbles over a bad page before the migration begins: these leave it to be found by reading."""

COMBINATIONS = [
    (accel, backing, way, SLOW[number] if way == "unknown" else WORKLOADS[(number + index) % len(WORKLOADS)])
    for number, (accel, backing) in enumerate(product(ACCELS, BACKINGS))
    for index, way in enumerate(WAYS)
]

Kind = tuple[str, int]
"""Backing, and bytes of its pages."""

KINDS: list[tuple[Kind, Kind]] = [
    (("memfd", PAGE_2M), ("memfd", PAGE_2M)),
    (("anonymous", PAGE_2M), ("anonymous", PAGE_2M)),
    (("memfd", PAGE_2M), ("memfd", PAGE_4K)),
    (("memfd", PAGE_4K), ("memfd", PAGE_2M)),
    (("anonymous", PAGE_2M), ("memfd", PAGE_4K)),
    (("memfd", PAGE_4K), ("anonymous", PAGE_4K)),
    (("anonymous", PAGE_4K), ("memfd", PAGE_4K)),
]
"""The backing of memory on the source, and on the destination."""
