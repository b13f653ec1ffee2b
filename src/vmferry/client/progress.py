"""The progress of moves on a screen: a bar for each in place on a terminal, plain lines elsewhere.

Rate and remaining time are the daemon's. Nothing is estimated here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from vmferry.client.plain import age_words, enum_word, limit_words, size_words
from vmferry.v1.migrations_pb2 import DIRECTION_IN, Migration
from vmferry.v1.migrations_pb2 import Phase as PhaseEnum

LINE_EVERY_S = 0.5
"""The least pause between two lines of progress without a terminal. A change of phase is always shown."""


def phase_word(migration: Migration) -> str:
    return enum_word(PhaseEnum.DESCRIPTOR, migration.phase)


def way_words(migration: Migration) -> str:
    """The other host, with an arrow from or to it."""
    if migration.direction == DIRECTION_IN:
        return f"← {migration.source_host or 'unknown'}"
    return f"→ {migration.destination_host or migration.destination}"


def arrived(migration: Migration) -> int:
    """The pages that the source is no longer needed for."""
    return int(migration.progress.total - migration.progress.absent)


def done_words(migration: Migration) -> str:
    """The share of pages that has arrived; empty before there are pages."""
    total = migration.progress.total
    return f"{100 * arrived(migration) // total} %" if total else ""


def pace_words(migration: Migration) -> str:
    """Rate and remaining time, as far as the daemon knows them."""
    page = migration.progress
    words = f"{size_words(page.rate_bytes_per_s)}/s"
    if page.remaining_s and page.absent:
        words += f", done in ~{age_words(page.remaining_s)}"
    return words


def progress_words(migration: Migration) -> str:
    """The state of a migration in one line."""
    page = migration.progress
    parts = [f"{migration.vm}: {phase_word(migration)}"]
    if page.total:
        parts.append(f"pages {arrived(migration)}/{page.total} ({done_words(migration)})")
        parts.append(pace_words(migration))
        if migration.push_bytes_per_s:
            parts.append(f"push limit {limit_words(migration.push_bytes_per_s)}")
        parts.append(f"faults {page.faults}")
        if page.waiting_faults:
            parts.append(f"{page.waiting_faults} waiting")
        touch = page.first_touch
        if touch.count:
            parts.append(f"first touch p50 {touch.p50_us:.0f} µs p99 {touch.p99_us:.0f} µs")
        parts.append(f"poison {page.poison}")
        parts.append(f"machine checks {page.machine_checks}")
    if migration.reason or migration.reason_code:
        parts.append(f"[{migration.reason_code}] {migration.reason}")
    return ", ".join(parts)


class ProgressView:
    """Shows each `Migration`: as a bar in place on a terminal, as plain lines elsewhere."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, tuple[int, float]] = {}
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.fields[vm]}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[words]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> ProgressView:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, migration: Migration) -> None:
        now = self._now()
        phase, at = self._told.get(migration.migration_id, (-1, float("-inf")))
        changed = migration.phase != phase
        if self._bars is not None:
            self._draw(self._bars, migration)
        if changed or (self._bars is None and now - at >= LINE_EVERY_S):
            self._told[migration.migration_id] = (migration.phase, now)
            self._console.print(progress_words(migration), markup=False, highlight=False, soft_wrap=True)

    def _draw(self, bars: Progress, migration: Migration) -> None:
        name = migration.migration_id
        if name not in self._tasks:
            self._tasks[name] = bars.add_task("", vm="", words="")
        words = f"{done_words(migration)} {phase_word(migration)} {pace_words(migration)}"
        bars.update(
            self._tasks[name],
            total=max(1, migration.progress.total),
            completed=arrived(migration),
            vm=migration.vm,
            words=words,
        )
