"""The name of a test is a claim in field terms: it names its actors, and it is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.house.files import ending, text_of

RIDDLE = re.compile(
    r"(?:^|_)(?:what|who|whoever|whom|beside|meanwhile|go(?:es)?_on|stands?_still|now_and_then|told_of)(?:_|$)"
)
LONGEST = 95
_PYTHON = re.compile(r"^\s*(?:async )?def (test_\w+)\(", re.MULTILINE)
_RUST = re.compile(r"#\[(?:tokio::)?test\]\s*(?:#\[[^\]]*\]\s*)*(?:async )?fn (\w+)")


def names(path: Path) -> list[str]:
    """The tests of a file."""
    return (_RUST if path.suffix == ".rs" else _PYTHON).findall(text_of(path))


FILES = [path for path in ending(".py", ".rs") if names(path)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_name_has_no_riddle(path: Path) -> None:
    assert [name for name in names(path) if RIDDLE.search(name)] == []


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_name_is_short(path: Path) -> None:
    assert [name for name in names(path) if len(name) > LONGEST] == []


@pytest.mark.parametrize(
    ("name", "is_riddle"),
    [
        ("what_is_wrong_is_said", True),
        ("a_guest_goes_on", True),
        ("page_is_told_of", True),
        ("a_wrong_value_is_named", False),
        ("whole_pages_are_sent", False),
    ],
)
def test_a_riddle_is_found(name: str, is_riddle: bool) -> None:
    assert bool(RIDDLE.search(name)) is is_riddle


def test_both_languages_are_read() -> None:
    assert {path.suffix for path in FILES} == {".py", ".rs"}
    assert len(FILES) > 200
