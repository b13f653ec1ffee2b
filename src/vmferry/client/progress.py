"""The progress of a move on a screen: a table in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from vmferry.client.plain import enum_word, limit_words, size_words
from vmferry.v1.migrations_pb2 import Migration
from vmferry.v1.migrations_pb2 import Phase as PhaseEnum

LINE_EVERY_S = 0.5
"""The least pause between two lines of progress without a terminal. A change of phase is always shown."""


def phase_word(migration: Migration) -> str:
    return enum_word(PhaseEnum.DESCRIPTOR, migration.phase)


class Rate:
    """Bytes per second over the last second or so, from growing counts."""

    WINDOW_S = 1.0

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def add(self, at_s: float, count: int) -> float:
        """Adds the count at a monotonic time and returns the rate."""
        self._seen.append((at_s, count))
        while len(self._seen) > 2 and self._seen[1][0] <= at_s - self.WINDOW_S:
            self._seen.pop(0)
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def arrived(migration: Migration) -> int:
    """The pages that the source is no longer needed for."""
    return int(migration.progress.total - migration.progress.absent)


def progress_words(migration: Migration, bytes_per_s: float) -> str:
    """The state of a migration in one line."""
    page = migration.progress
    parts = [f"{migration.vm}: {phase_word(migration)}"]
    if page.total:
        parts.append(f"pages {arrived(migration)}/{page.total} ({100 * arrived(migration) // page.total} %)")
        parts.append(f"{size_words(bytes_per_s)}/s")
        if migration.push_bytes_per_s:
            parts.append(f"push limit {limit_words(migration.push_bytes_per_s)}")
        parts.append(f"faults {page.faults}")
        touch = page.first_touch
        if touch.count:
            parts.append(f"first touch p50 {touch.p50_us:.0f} µs p99 {touch.p99_us:.0f} µs")
        parts.append(f"poison {page.poison}")
        parts.append(f"machine checks {page.machine_checks}")
    if migration.reason or migration.reason_code:
        parts.append(f"[{migration.reason_code}] {migration.reason}")
    return ", ".join(parts)


def _bar(done: int, total: int, width: int = 32) -> str:
    filled = width * done // total if total else 0
    return "━" * filled + "╌" * (width - filled)


def progress_table(migration: Migration, bytes_per_s: float) -> Table:
    """The state of a migration for a terminal, in a few lines."""
    page, touch = migration.progress, migration.progress.first_touch
    table = Table.grid(padding=(0, 2))
    table.add_row("phase", f"[bold]{phase_word(migration)}[/bold]", _bar(arrived(migration), page.total))
    table.add_row("pages", f"{arrived(migration)} of {page.total}", f"{size_words(bytes_per_s)}/s")
    table.add_row("push limit", limit_words(migration.push_bytes_per_s))
    table.add_row(
        "came by", f"demand {page.demand}  push {page.push}", f"zero {page.zero}  [red]poison {page.poison}[/red]"
    )
    table.add_row("faults", str(page.faults), f"first touch p50 {touch.p50_us:.0f} µs  p99 {touch.p99_us:.0f} µs")
    table.add_row("machine checks", str(page.machine_checks), f"{migration.reason_code} {migration.reason}".strip())
    return table


class ProgressView:
    """Shows each `Migration`: as a table in place on a terminal, as plain lines elsewhere."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._live = Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
        self._rates: dict[str, Rate] = {}
        self._told: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, migration: Migration) -> None:
        now = self._now()
        rate = self._rates.setdefault(migration.migration_id, Rate()).add(now, migration.progress.bytes_received)
        phase, at = self._told.get(migration.migration_id, (-1, float("-inf")))
        changed = migration.phase != phase
        if self._live is not None:
            self._live.update(progress_table(migration, rate))
        if changed or (self._live is None and now - at >= LINE_EVERY_S):
            self._told[migration.migration_id] = (migration.phase, now)
            self._console.print(progress_words(migration, rate), markup=False, highlight=False, soft_wrap=True)
