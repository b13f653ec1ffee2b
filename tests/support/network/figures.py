"""What moves over a network took, as a page: for people, no test looks at it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.network.emulator import Conditions
from vmferry.client.progress import phase_word
from vmferry.units import MIB, PAGE_4K
from vmferry.v1.migrations_pb2 import Migration

HEAD = """# Migrations over networks

`make network-page` writes this page. Two daemons run in two network namespaces of one machine:
{machine}.
An emulator ([emulator.c](../../tests/support/network/emulator.c)) joins them. Guests are threads
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

    @property
    def rtt_ms(self) -> float:
        return 2 * self.conditions.delay_ms

    @property
    def postcopy_s(self) -> float:
        return max(self.migration.total_s - self.migration.downtime_s, 0.001)

    @property
    def downtime(self) -> str:
        value_ms = self.migration.downtime_s * 1e3
        return f"{value_ms:.0f} ms{_of(value_ms, self.rtt_ms)}"

    @property
    def touch(self) -> str:
        value_ms = self.migration.progress.first_touch.p50_us / 1e3
        return f"{value_ms:.1f} ms{_of(value_ms, self.rtt_ms)}"

    @property
    def push(self) -> str:
        return f"{self.migration.progress.push * PAGE_4K / MIB / self.postcopy_s:.1f} MiB/s"

    @property
    def received(self) -> str:
        """Demand and push together, per time of the postcopy phase."""
        return f"{self.migration.progress.bytes_received * 8 / 1e6 / self.postcopy_s:.0f} Mbit/s"

    def __str__(self) -> str:
        moved, seen = self.migration, self.migration.progress
        return (
            f"| {self.name} | {phase_word(moved)} | {moved.total_s:.1f} s | {self.downtime} | {self.touch}"
            f" | {seen.first_touch.p99_us / 1e3:.0f} ms | {seen.demand} | {seen.push} | {self.push} |"
        )


def _of(value_ms: float, rtt_ms: float) -> str:
    """In round trips."""
    return f" ({value_ms / rtt_ms:.1f} RTT)" if rtt_ms >= 1 else ""


def against_rtt(lines: Iterable[Line]) -> str:
    """Of the lines that have a delay and nothing else."""
    plain = [line for line in lines if re.fullmatch(r"rtt-\d+", line.name)]
    rows = [f"| {line.rtt_ms:.0f} ms | {line.touch} | {line.downtime} |" for line in sorted(plain, key=_rtt)]
    head = "| RTT | first touch p50 | downtime |\n|---:|---:|---:|"
    return "\n".join(["## First touch and downtime against RTT", "", head, *rows])


def against_rate(lines: Iterable[Line]) -> str:
    """Of the lines that have a rate."""
    limited = sorted((line for line in lines if line.conditions.rate_mbit), key=lambda line: line.conditions.rate_mbit)
    rows = [
        f"| {line.conditions.rate_mbit:.0f} Mbit/s | {line.conditions.queue_ms:.0f} ms | {line.rtt_ms:.0f} ms"
        f" | {line.received} | {line.push} | {line.touch} |"
        for line in limited
    ]
    head = "| rate | longest queue | RTT | received | push | first touch p50 |\n|---:|---:|---:|---:|---:|---:|"
    return "\n".join(["## Push and first touch against the rate of the network", "", head, *rows])


def _rtt(line: Line) -> float:
    return line.rtt_ms


class Figures:
    """Collects lines; written to the file that `VMFERRY_NETWORK_PAGE` names, if it does."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}

    def add(self, name: str, conditions: Conditions, migration: Migration) -> None:
        """Takes the place of an earlier line of that name."""
        self._lines[name] = Line(name, conditions, migration)

    def write(self) -> None:
        page = os.environ.get("VMFERRY_NETWORK_PAGE")
        if page and self._lines:
            load, _, _ = os.getloadavg()
            machine = f"{os.cpu_count()} CPUs, Linux {platform.release()}, load average {load:.0f}"
            lines = self._lines.values()
            table = HEAD.format(machine=machine) + "\n".join(map(str, lines))
            Path(page).write_text("\n\n".join([table, against_rtt(lines), against_rate(lines)]) + "\n")
