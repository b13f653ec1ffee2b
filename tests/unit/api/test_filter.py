"""The filter's grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.api.filter import FIELDS, Filter, FilterError, parse
from vmferry.model.migration import Job, Phase


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", Filter()),
        ("   ", Filter()),
        ("vm = web-1", Filter(vm="web-1")),
        ("vm=web-1", Filter(vm="web-1")),
        ('vm = "a \\"b\\" = AND"', Filter(vm='a "b" = AND')),
        ("phase = POSTCOPY AND active = true", Filter(phase=Phase.POSTCOPY, active=True)),
        ('destination = "h:7601" AND active=false', Filter(destination="h:7601", active=False)),
        ("vm = AND AND active = true", Filter(vm="AND", active=True)),
    ],
)
def test_good(text: str, parsed: Filter) -> None:
    assert parse(text) == parsed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vm", "expected '='"),
        ("vm =", "expected a value for vm"),
        ("= a", "expected one of vm"),
        ("colour = red", "'colour' at character 0"),
        ("vm = a OR vm = b", "expected AND, found 'OR'"),
        ("vm = a AND", "expected a term after"),
        ("vm = a AND vm = b", "vm comes twice"),
        ("phase = DANCING", "no phase 'DANCING'"),
        ("active = yes", "active must be true or false"),
        ('vm = "a', "does not end, from character 4"),
        ('"vm" = a', "expected one of"),
        ("vm = a" * 400, "at most 1024"),
    ],
)
def test_bad(text: str, says: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_all_terms_must_hold() -> None:
    job = Job("m", "a", "h:1", phase=Phase.COMPLETED)
    assert parse("vm = a AND active = false").matches(job)
    assert not parse("vm = a AND active = true").matches(job)
    assert not parse("vm = b").matches(job)


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        assert isinstance(parse(text), Filter)
    except FilterError as error:
        assert str(error)


@given(st.text(alphabet='vmactiephs="\\ ANDtrue=', max_size=40))
def test_nearly_right_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse(text)
    except FilterError as error:
        assert str(error)


@given(st.text(max_size=60))
def test_any_quoted_value_comes_back(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    assert parse(f'vm = "{quoted}"').vm == value
    assert FIELDS[0] == "vm"
