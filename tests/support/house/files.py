"""The files that the gates read: those that git knows or would take, so that no build product is measured."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[3]


@cache
def tracked() -> tuple[Path, ...]:
    """Every file of the tree by its path from the root; in git or about to be added, and not deleted."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    paths = {Path(name) for name in listed.stdout.split("\0") if name}
    return tuple(sorted(path for path in paths if (ROOT / path).is_file()))


def ending(*suffixes: str) -> list[Path]:
    """Those with one of these suffixes."""
    return [path for path in tracked() if path.suffix in suffixes]


@cache
def text_of(path: Path) -> str:
    """Its text."""
    return (ROOT / path).read_text()


def exists(path: Path) -> bool:
    """Whether the tree has this file, or a file in this folder."""
    return path in _all()


@cache
def _all() -> frozenset[Path]:
    return frozenset(place for path in tracked() for place in (path, *path.parents))
