"""The name of a log event is a constant of its module, and reads `area.fact`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.house.files import ROOT

SOURCES = sorted(path for path in (ROOT / "src/vmferry").rglob("*.py") if "v1" not in path.parts)
METHODS = {"debug", "info", "warning", "error", "exception"}
NAME = re.compile(r"[a-z]+\.[a-z_]+")


def log_calls(tree: ast.AST) -> Iterator[ast.expr]:
    """The event of each call of a logger, and of each `partial` of one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        target, arguments = node.func, node.args
        if isinstance(target, ast.Name) and target.id == "partial" and arguments:
            target, arguments = arguments[0], arguments[1:]
        if isinstance(target, ast.Attribute) and target.attr in METHODS and _is_logger(target.value):
            assert arguments, f"line {node.lineno}: no event"
            yield arguments[0]


def _is_logger(of: ast.expr) -> bool:
    name = of.attr if isinstance(of, ast.Attribute) else of.id if isinstance(of, ast.Name) else ""
    return name in {"log", "_log"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_events_are_constants(path: Path) -> None:
    for event in log_calls(ast.parse(path.read_text())):
        name = event.attr if isinstance(event, ast.Attribute) else event.id if isinstance(event, ast.Name) else ""
        assert name.isupper(), f"line {event.lineno}: {ast.unparse(event)} is no constant"


def test_events_read_area_and_fact() -> None:
    events = dict(events_of_all())
    assert len(events) > 20
    assert not [f"{name} = {value!r}" for name, value in events.items() if not NAME.fullmatch(value)]


def events_of_all() -> Iterator[tuple[str, str]]:
    """The constants that are used as events, as module.NAME and value."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used = {event.id for event in log_calls(tree) if isinstance(event, ast.Name)}
        for node in tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(value))) if name in used:
                    yield f"{path.relative_to(ROOT)}:{name}", value
