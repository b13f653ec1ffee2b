"""The output of a verb: text and tables for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmferry.client.refusal import ApiError

UNLIMITED = 10_000
"""The columns of an output that is no terminal: nothing is cut or wrapped there."""


class Output:
    """The two streams of a verb: results on standard output, everything else on standard error."""

    def __init__(
        self, as_json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None, form: str = ""
    ) -> None:
        self.as_json = as_json
        self.form = form
        """`wide`, `name`, or empty."""
        self._stdout = stdout or sys.stdout
        self.results = _console(self._stdout)
        self.notes = _console(stderr or sys.stderr)

    @property
    def progress(self) -> Console:
        """Shows live progress, except with JSON."""
        return self.notes if self.as_json else self.results

    def event(self, value: dict[str, Any]) -> None:
        """Writes one JSON object on its own line and flushes it, so that a reader of the pipe gets it at once."""
        self._stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        self._stdout.flush()

    def text(self, words: str) -> None:
        self.results.print(words, markup=False, soft_wrap=True)

    def note(self, words: str) -> None:
        self.notes.print(words, markup=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
        """Writes a table, or the words `empty` where there is no row."""
        if not rows:
            self.text(empty)
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            table.add_column(column, no_wrap=True, overflow="ignore")
        for row in rows:
            table.add_row(*map(Text, row))
        # Nothing is cut: names must be copied whole. A long line wraps on a narrow terminal.
        self.results.print(table, crop=False, soft_wrap=True)

    def refused(self, error: ApiError) -> None:
        """Writes the refusal and its remedy, with JSON also as an event."""
        if self.as_json:
            self.event({"error": {"reason": error.reason, "message": error.message, "remedy": error.remedy}})
        self.note(f"vmferry: {error.message or 'no reason given'} ({error.reason})")
        if error.remedy:
            self.note(f"  {error.remedy}")
        if error.runbook:
            self.note(f"  see {error.runbook}")


class _Console(Console):
    """A console that raises BrokenPipeError for a reader that has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console(file: TextIO) -> Console:
    return _Console(file=file, highlight=False, width=None if file.isatty() else UNLIMITED)
