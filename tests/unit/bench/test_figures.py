"""Statistics of rounds."""

from __future__ import annotations

import math

import pytest
from vmferry_bench.figures import (
    common_rates,
    count,
    figures,
    merged,
    middle,
    pairs,
    quantile,
    quantiles,
    ratios,
    share_of,
    spread,
    total_s,
    waited,
)

from tests.support.bench_rounds import a_round

BUCKETS = [(0.5, 1.0, 900), (100.0, 120.0, 90), (1000.0, 1200.0, 10)]


def test_only_touches_that_waited_are_waits() -> None:
    assert waited(BUCKETS) == BUCKETS[1:]
    assert count(waited(BUCKETS)) == 100


def test_quantile_interpolates_within_its_bucket() -> None:
    waits = waited(BUCKETS)
    assert quantile(waits, 0.45) == pytest.approx(110.0)
    assert quantile(waits, 0.90) == pytest.approx(120.0)
    assert quantile(waits, 0.99) == pytest.approx(1180.0)
    assert quantile(waits, 1.0) == pytest.approx(1200.0)
    assert math.isnan(quantile([], 0.5))


def test_blocked_time_is_the_sum_of_the_waits() -> None:
    assert total_s(waited(BUCKETS)) == pytest.approx((90 * 110 + 10 * 1100) / 1e6)


def test_rounds_are_merged_bucket_by_bucket() -> None:
    assert merged([BUCKETS[:2], BUCKETS[1:]]) == [(0.5, 1.0, 900), (100.0, 120.0, 180), (1000.0, 1200.0, 10)]


def test_shares_of_plain_values() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (share_of(values, 0.5), share_of(values, 0.99), share_of(values, 1.0)) == (50.0, 99.0, 100.0)
    assert math.isnan(share_of([], 0.5))


def test_middle_and_spread_leave_out_missing_numbers() -> None:
    assert middle([3.0, math.nan, 1.0, 2.0]) == 2.0
    assert spread([3.0, math.nan, 1.0]) == (1.0, 3.0)
    assert math.isnan(middle([math.nan]))


def test_ratios_leave_out_missing_and_zero_divisors() -> None:
    assert ratios([(1.0, 2.0), (2.0, 0.0), (math.nan, 1.0), (4.0, 2.0)]) == [0.5, 2.0]


def test_only_rounds_that_ran_side_by_side_are_compared() -> None:
    ours = [a_round("vmferry", number=number) for number in (0, 2, 8)]
    theirs = [a_round("qemu-preempt", number=number) for number in (1, 5, 9)]
    assert [(a.number, b.number) for a, b in pairs(ours, theirs)] == [(0, 1), (8, 9)]


def test_figures_of_a_round() -> None:
    found = figures(a_round("vmferry"))
    assert found["waits"] == 100
    assert found["throughput_gib_s"] == pytest.approx(1.0)
    assert found["whole_gib_s"] == pytest.approx(0.5)
    assert found["cpu_s_per_gib"] == pytest.approx(0.5)
    assert found["blackout_guest_ms"] == pytest.approx(10.0)
    assert found["blocked_s"] == pytest.approx(100 * 950 / 1e6)


def test_quantiles_of_plain_values() -> None:
    found = quantiles([float(n) for n in range(1, 101)])
    assert found == {"count": 100.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert quantiles([]) == {}


def test_rates_are_of_the_time_in_which_all_touch() -> None:
    fast, slow = [100.0] * 100, [200.0] * 100
    assert common_rates([0.01, 0.02], [fast, slow], 0) == pytest.approx([5000.0, 10000.0])
    # Half of what each took were pauses that overslept.
    assert common_rates([0.04, 0.04], [fast, fast], 100) == pytest.approx([2500.0, 2500.0])


def test_handler_times_are_figures_where_they_are_known() -> None:
    assert math.isnan(figures(a_round("qemu-preempt"))["handler_p50_us"])
    found = figures(a_round("qemu-preempt", handler_us={"p50": 1.0, "p90": 2.0, "p99": 3.0, "max": 4.0}))
    assert [found[f"handler_{q}_us"] for q in ("p50", "p90", "p99", "max")] == [1.0, 2.0, 3.0, 4.0]
