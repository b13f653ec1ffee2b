"""The dashboard as HTML, from the document of /api/v1/state. The page and its live updates share their templates."""

from __future__ import annotations

from datetime import UTC, datetime

import jinja2

from vmferry.ops.document import Document

SECTIONS = ("machines", "migrations", "incoming", "errors", "events")
"""The parts of the page that are replaced when they change. Each has a template `_NAME.html`."""


class Page:
    """Renders the whole page, or its parts."""

    def __init__(self) -> None:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("vmferry.ops"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters.update(size=size, time=time_of, touch=touch, duration=duration)
        self._page = environment.get_template("dashboard.html")
        self._parts = {name: environment.get_template(f"_{name}.html") for name in SECTIONS}

    def html(self, document: Document, error: str) -> str:
        return self._page.render(document=document, parts=self.parts(document), error=error)

    def parts(self, document: Document) -> dict[str, str]:
        return {name: template.render(document=document) for name, template in self._parts.items()}


def size(value: float) -> str:
    """Bytes for people: 512 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if value == int(value) or unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def time_of(at_us: int) -> str:
    """Unix microseconds as UTC to the millisecond; a dash for "not yet"."""
    if not at_us:
        return "–"  # noqa: RUF001 - the sign for no value
    return datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def touch(value_us: float) -> str:
    """A latency: 95 µs, 4.2 ms."""
    return f"{value_us:.0f} µs" if value_us < 1000 else f"{value_us / 1000:.1f} ms"


def duration(value_s: float) -> str:
    """A duration: 12.5 ms, 3.2 s; a dash for "not yet"."""
    if not value_s:
        return "–"  # noqa: RUF001 - the sign for no value
    return f"{value_s * 1000:.1f} ms" if value_s < 1 else f"{value_s:.1f} s"
