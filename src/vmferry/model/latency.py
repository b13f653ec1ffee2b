"""Histograms of first touches: the bounds of the pager's buckets, differences, and quantiles. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vmferry.model.migration import Latency

_STEPS = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
BOUNDS_US: tuple[float, ...] = (*(step * 10 ** (decade + 1) for decade in range(6) for step in _STEPS), 1e7)
"""The upper bounds of the buckets, microseconds (`LatencySummary.buckets` of common.proto). One more bucket has the
longer touches.
"""


def between(earlier: Latency, later: Latency) -> Latency:
    """The touches that `later` has and `earlier` does not. Counts that fell, by a new pager, count as all new."""
    before = earlier if later.count >= earlier.count else Latency()
    padded = (*before.buckets, *[0] * len(later.buckets))
    counts = tuple(max(0, now - then) for now, then in zip(later.buckets, padded, strict=False))
    return summary(counts, max(0.0, later.sum_us - before.sum_us))


def summary(counts: Sequence[int], sum_us: float) -> Latency:
    """The summary of a histogram. Quantiles are interpolated within their bucket."""
    total = sum(counts)
    if not total:
        return Latency()
    used = max(index for index, count in enumerate(counts) if count)
    return Latency(
        count=total,
        p50_us=_quantile(counts, total, 0.5),
        p90_us=_quantile(counts, total, 0.9),
        p99_us=_quantile(counts, total, 0.99),
        max_us=BOUNDS_US[min(used, len(BOUNDS_US) - 1)],
        buckets=tuple(counts[: used + 1]),
        sum_us=sum_us,
    )


def added(first: Latency, second: Latency) -> Latency:
    """The touches of both."""
    length = max(len(first.buckets), len(second.buckets))
    counts = [sum(one.buckets[index] for one in (first, second) if index < len(one.buckets)) for index in range(length)]
    return summary(counts, first.sum_us + second.sum_us)


def _quantile(counts: Sequence[int], total: int, quantile: float) -> float:
    rank, below = quantile * total, 0
    for index, count in enumerate(counts):
        if count and below + count >= rank:
            low = BOUNDS_US[index - 1] if 0 < index <= len(BOUNDS_US) else 0.0
            high = BOUNDS_US[min(index, len(BOUNDS_US) - 1)]
            return low + (high - low) * max(0.0, rank - below) / count
        below += count
    return BOUNDS_US[-1]
