"""The gates that hold a file to the house rules, and the files that are exempt from one for now."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.house.comments import prose
from tests.support.house.files import ROOT, ending, text_of
from tests.support.house.markdown import fences
from tests.support.house.prose import measure

EXEMPT = Path("tests/house/exempt.toml")
LINES_A_MODULE = 500
GENERATED = {Path("docs/performance/raw/bench.md"), Path("docs/performance/raw/profile.md")}
"""Figures of a run."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A rule for single files: the files that it reads, and the faults of one, none if it passes."""

    name: str
    files: Callable[[], list[Path]]
    faults: Callable[[Path], list[str]]


def _with_prose() -> list[Path]:
    configs = [path for path in ending(".toml") if path.is_relative_to("configs")]
    return [path for path in ending(".md", ".py", ".rs", ".proto") if path not in GENERATED] + configs


def _prose_faults(path: Path) -> list[str]:
    """Long sentences count in documents, and in the comments that become one."""
    return measure(prose(path, text_of(path))).faults(sentences_too=path.suffix in (".md", ".proto"))


def _markdown() -> list[Path]:
    return [path for path in ending(".md") if path not in GENERATED]


def _markdown_faults(path: Path) -> list[str]:
    open_fences = [
        f"{fence.line}: a fence is inside this block: a closing fence has no text behind it"
        for fence in fences(text_of(path))
        if any(line.startswith("```") for line in fence.text.splitlines())
    ]
    return open_fences + [
        f"{fault['line']}:{fault['column']}: {fault['rule']}: {fault['message']}"
        for fault in rumdl(ROOT)
        if Path(fault["file"]) == path
    ]


@cache
def rumdl(root: Path) -> list[dict[str, Any]]:
    """Every fault that rumdl finds under a folder, by the settings in its `pyproject.toml`."""
    run = subprocess.run(
        [Path(sys.executable).with_name("rumdl"), "check", "--no-cache", "--output-format", "json", "."],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


def _modules() -> list[Path]:
    return ending(".py", ".rs", ".c")


def _length_faults(path: Path) -> list[str]:
    lines = len(text_of(path).splitlines())
    return [f"{lines} lines, at most {LINES_A_MODULE} pass"] if lines > LINES_A_MODULE else []


PROSE = Gate("prose", _with_prose, _prose_faults)
MARKDOWN = Gate("markdown", _markdown, _markdown_faults)
LENGTH = Gate("length", _modules, _length_faults)
GATES = (PROSE, MARKDOWN, LENGTH)


@cache
def exempt(gate: Gate) -> frozenset[Path]:
    """The files that need not pass yet."""
    return frozenset(Path(name) for name in tomllib.loads((ROOT / EXEMPT).read_text())[gate.name])
