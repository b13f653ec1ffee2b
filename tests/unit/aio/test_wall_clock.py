"""Readings of a clock that is wrong."""

from __future__ import annotations

import time

import pytest

from vmferry.aio import wall_clock
from vmferry.migration.environment import SystemClock


def test_now_is_the_clock_of_the_host() -> None:
    before = time.time_ns() // 1000
    assert before <= wall_clock.now_us() <= time.time_ns() // 1000


@pytest.mark.parametrize("shown_ns", [-7_203_877_472 * 10**9, -1, 0])
def test_a_clock_before_1970_reads_as_its_first_moment(monkeypatch: pytest.MonkeyPatch, shown_ns: int) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: shown_ns)
    assert SystemClock().now_us() == wall_clock.EARLIEST_US
    assert wall_clock.iso_utc(SystemClock().now_us()) == "1970-01-01T00:00:00.000001Z"


def test_a_clock_that_python_cannot_read_reads_as_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond() -> int:
        raise OverflowError("timestamp too large to convert to C _PyTime_t")

    monkeypatch.setattr(time, "time_ns", beyond)
    assert SystemClock().now_us() == wall_clock.LATEST_US
    assert wall_clock.iso_utc(SystemClock().now_us()).startswith("2262-04-11T23:47:16")
