"""What moves over a network took, as a page: for people, no test looks at it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from tests.support.network.emulator import Conditions
from vmferry.client.progress import phase_word
from vmferry.units import MIB, PAGE_4K
from vmferry.v1.migrations_pb2 import Migration

HEAD = """# Migrations over networks

`make network-page` writes this page. Two daemons run in two network namespaces of one machine:
{machine}. An emulator
([emulator.c](../../tests/support/network/emulator.c)) joins them. Guests are threads
of a process that touch all of their memory at random. First touch is the time from a
fault's event to its page, by the destination pager. RTT is the delay of the emulator, and the
machine's own part comes on top. A hole is an outage of the network during the move.

| conditions | outcome | whole move | downtime | first touch p50 | p99 | by demand | by push | push |
|---|---|---:|---:|---:|---:|---:|---:|---:|
"""


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    conditions: Conditions
    migration: Migration

    def __str__(self) -> str:
        moved, seen = self.migration, self.migration.progress
        rtt_ms = 2 * self.conditions.delay_ms
        touch = seen.first_touch
        postcopy_s = max(moved.total_s - moved.downtime_s, 0.001)
        return (
            f"| {self.name} | {phase_word(moved)} | {moved.total_s:.1f} s"
            f" | {moved.downtime_s * 1e3:.0f} ms{_of(moved.downtime_s * 1e3, rtt_ms)}"
            f" | {touch.p50_us / 1e3:.1f} ms{_of(touch.p50_us / 1e3, rtt_ms)} | {touch.p99_us / 1e3:.0f} ms"
            f" | {seen.demand} | {seen.push} | {seen.push * PAGE_4K / MIB / postcopy_s:.1f} MiB/s |"
        )


def _of(value_ms: float, rtt_ms: float) -> str:
    """In round trips."""
    return f" ({value_ms / rtt_ms:.1f} RTT)" if rtt_ms >= 1 else ""


class Figures:
    """Collects lines; written to the file that `VMFERRY_NETWORK_PAGE` names, if it does."""

    def __init__(self) -> None:
        self._lines: list[Line] = []

    def add(self, name: str, conditions: Conditions, migration: Migration) -> None:
        self._lines.append(Line(name, conditions, migration))

    def write(self) -> None:
        page = os.environ.get("VMFERRY_NETWORK_PAGE")
        if page and self._lines:
            machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}"
            Path(page).write_text(HEAD.format(machine=machine) + "".join(f"{line}\n" for line in self._lines))
