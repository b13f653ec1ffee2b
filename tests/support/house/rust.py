"""The structure of a Rust crate, read from its sources: its types, its inline tests, and its modules' arrows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.support.house.files import ending, text_of

_TYPE = re.compile(r"^(?:pub(?:\([^)]*\))? )?(?:struct|enum|union|trait|type) (\w+)", re.MULTILINE)
_INLINE_TESTS = re.compile(r"^\s*mod tests \{", re.MULTILINE)
_LOG_CALL = re.compile(r"(?<!\w)(?:tracing::)?(?:trace|debug|info|warn|error)!\(")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_IMPORT = re.compile(r"\bcrate::(?:([a-z]\w*)|\{([^}]*)\})")


def crates() -> list[Path]:
    """The source folder of each crate, by its root file."""
    return sorted({path.parent for path in ending(".rs") if path.name in ("lib.rs", "main.rs") and "src" in path.parts})


def modules(crate: Path) -> list[Path]:
    """Every file of a crate that is no test."""
    inside = [path for path in ending(".rs") if path.is_relative_to(crate)]
    return [path for path in inside if "tests" not in (*path.parts, path.stem)]


def types(text: str) -> list[str]:
    """The types and traits that a module defines."""
    return _TYPE.findall(text)


def has_inline_tests(text: str) -> bool:
    """Whether a module holds its own tests."""
    return _INLINE_TESTS.search(text) is not None


def imports(text: str) -> set[str]:
    """The names behind `crate::` in the code of a module that may be modules: in lower case."""
    code = "\n".join(line.split("//")[0] for line in text.splitlines())
    return {
        name
        for one, several in _IMPORT.findall(code)
        for name in ([one] if one else re.findall(r"(?:^|,)\s*([a-z]\w*)", several))
    }


def log_events(text: str) -> Iterator[str]:
    """The event of each log call, as written: the string behind its fields; the whole arguments if there is none."""
    for call in _LOG_CALL.finditer(text):
        arguments = _arguments(text, call.end())
        strings = _STRING.findall(arguments)
        yield strings[-1][1:-1] if strings and arguments.rstrip(" \n,").endswith(strings[-1]) else arguments


def _arguments(text: str, start: int) -> str:
    """Up to the parenthesis that closes the call; one in a string counts for nothing."""
    depth, at = 1, start
    while depth:
        string = _STRING.match(text, at)
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at = string.end() if string else at + 1
    return text[start : at - 1]


def arrows(crate: Path) -> dict[str, set[str]]:
    """For each top-level module of a crate, the others that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in modules(crate):
        top = path.relative_to(crate).parts[0].removesuffix(".rs")
        if top not in ("lib", "main"):
            found[top] |= imports(text_of(path)) - {top}
    return {top: names & found.keys() for top, names in found.items()}


def circle(of: Mapping[str, Iterable[str]]) -> list[str] | None:
    """A walk along arrows that comes back to one of its modules; none if there is none."""
    done: set[str] = set()
    for start in of:
        for way in _walks(of, [start], done):
            return way
    return None


def _walks(of: Mapping[str, Iterable[str]], way: list[str], done: set[str]) -> Iterator[list[str]]:
    for name in sorted(of.get(way[-1], ())):
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            yield from _walks(of, [*way, name], done)
    done.add(way[-1])
