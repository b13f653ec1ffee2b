"""The sliding rate."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmferry.ops.rate import Rates


def test_a_steady_count_has_its_rate() -> None:
    rates = Rates()
    assert [rates.observe("a", second * 100, float(second)) for second in range(6)] == [0, 100, 100, 100, 100, 100]


def test_a_count_that_stands_still_falls_to_zero_within_the_window() -> None:
    rates = Rates()
    rates.observe("a", 0, 0.0)
    rates.observe("a", 1000, 1.0)
    assert [rates.observe("a", 1000, float(s)) for s in (2, 3, 4, 5)][-1] == 0


def test_a_count_that_fell_starts_anew() -> None:
    rates = Rates()
    rates.observe("a", 1000, 0.0)
    assert rates.observe("a", 10, 1.0) == 0.0
    assert rates.observe("a", 20, 2.0) == 10.0


def test_forgotten_keys_start_anew() -> None:
    rates = Rates()
    rates.observe("a", 0, 0.0)
    rates.keep(set())
    assert rates.observe("a", 500, 1.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.001, 5.0), st.integers(0, 1000)), max_size=60))
def test_a_rate_is_never_negative_nor_above_the_fastest_step(steps: list[tuple[float, int]]) -> None:
    rates, at, value = Rates(), 0.0, 0
    rates.observe("a", 0, 0.0)
    for gap, more in steps:
        at, value = at + gap, value + more
        assert 0 <= rates.observe("a", value, at) <= value / 0.199
