"""Rust crates: no two types of one name, arrows one way, tests in files of their own, log events by name.

`pager/tests/architecture.rs` holds the pager to its layers as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.house.files import ending, text_of
from tests.support.house.rust import arrows, circle, crates, has_inline_tests, imports, log_events, modules, types

EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
"""The name of a log event: `area.fact`, as of the daemon's."""
BY_CRATE = pytest.mark.parametrize("crate", crates(), ids=str)


def test_the_crates_are_found() -> None:
    assert {"pager/src", "refvm/src", "bench/src", "reach/src"} <= {str(crate) for crate in crates()}


@BY_CRATE
def test_no_two_types_have_one_name(crate: Path) -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in modules(crate):
        for name in types(text_of(path)):
            places[name].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@BY_CRATE
def test_arrows_go_one_way(crate: Path) -> None:
    assert circle(arrows(crate)) is None


@pytest.mark.parametrize("path", [path for path in ending(".rs") if "src" in path.parts], ids=str)
def test_tests_lie_in_a_file_of_their_own(path: Path) -> None:
    assert not has_inline_tests(text_of(path)), f"move them to {path.with_suffix('')}/tests.rs"


@BY_CRATE
def test_log_events_read_area_and_fact(crate: Path) -> None:
    events = {event: str(path) for path in modules(crate) for event in log_events(text_of(path))}
    assert {event: path for event, path in events.items() if not EVENT.fullmatch(event)} == {}


def test_log_events_are_found() -> None:
    text = 'tracing::info!(a = f("(", b), "x.y");\nwarn!(\n    %error,\n    "z.w",\n);\ninfo!(event = "a.b", c)'
    assert list(log_events(text)) == ["x.y", "z.w", 'event = "a.b", c']


def test_types_are_found() -> None:
    text = "pub struct A;\npub(crate) enum B {\n}\nstruct C<T>(T);\nfn d() {\n    struct E;\n}\ntrait F {}\n"
    assert types(text) == ["A", "B", "C", "F"]


def test_imports_are_found() -> None:
    text = "use crate::a::B;\nuse crate::{c, d::{E, F}};\nlet x = crate::g(); // crate::h\n"
    assert imports(text) == {"a", "c", "d", "g"}


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        ({"a": "bc", "b": "d", "c": "d", "d": ""}, None),
        ({"a": "b", "b": "c", "c": "b"}, ["b", "c", "b"]),
        ({"a": "", "b": "a", "c": "cb"}, ["c", "c"]),
    ],
)
def test_a_circle_is_found(of: dict[str, str], expected: list[str] | None) -> None:
    assert circle(of) == expected


def test_inline_tests_are_found() -> None:
    assert has_inline_tests("#[cfg(test)]\nmod tests {\n")
    assert not has_inline_tests("#[cfg(test)]\nmod tests;\n")
