"""Statistics of rounds: pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from vmferry_bench.shape import Bucket, Round

WAITED_US = 50.0
"""A first touch that took longer waited for its page. A present page costs under 1 µs, or 22 to 45 µs where KVM has to
shadow the page tables (`kvm-pvm`). An absent page costs an answer of another process as well, 40 µs or more."""


def waited(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Those of touches that waited."""
    return [bucket for bucket in buckets if bucket[0] >= WAITED_US]


def count(buckets: Iterable[Bucket]) -> int:
    return sum(n for _, _, n in buckets)


def quantile(buckets: Sequence[Bucket], q: float) -> float:
    """By linear interpolation within the bucket; NaN of nothing."""
    left = q * count(buckets)
    for low, high, n in buckets:
        if n and left <= n:
            return low + (high - low) * max(left, 0.0) / n
        left -= n
    return buckets[-1][1] if buckets else math.nan


def share_of(values: Iterable[float], q: float) -> float:
    """The least value that a share `q` of them does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)] if ordered else math.nan


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Count, p50, p90, p99 and the greatest; {} of none."""
    if not values:
        return {}
    shares = {f"p{percent}": share_of(values, percent / 100) for percent in (50, 90, 99)}
    return {"count": float(len(values)), **shares, "max": max(values)}


def common_rates(elapsed_s: Sequence[float], us: Sequence[Sequence[float]], pause_us: float) -> list[float]:
    """Touches a second of each VM while all of them touch: until the first is through. The times
    of a VM's touches and the time of all together are known. The rest of that time counts as equal pauses."""
    window = min(elapsed_s)
    rates = []
    for whole, each in zip(elapsed_s, us, strict=True):
        scale = whole * 1e6 / sum(t + pause_us for t in each)
        at, done = 0.0, 0
        for t in each:
            at += (t + pause_us) * scale
            done += at <= window * 1e6 * 1.000001
        rates.append(done / window)
    return sorted(rates)


def total_s(buckets: Iterable[Bucket]) -> float:
    """Their sum, each taken for the middle of its bucket (these are a quarter of a power of two wide)."""
    return sum((low + high) / 2 * n for low, high, n in buckets) / 1e6


def merged(parts: Iterable[Sequence[Bucket]]) -> list[Bucket]:
    """The buckets of several rounds together."""
    sums: dict[tuple[float, float], int] = {}
    for part in parts:
        for low, high, n in part:
            sums[low, high] = sums.get((low, high), 0) + n
    return [(low, high, n) for (low, high), n in sorted(sums.items())]


GIB = 1 << 30


def _known(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds


def figures(one: Round) -> dict[str, float]:
    """The compared figures of one round."""
    slow = waited(one.buckets)
    handler = one.handler_us or {}
    moved_gib = one.shape.memory_mib / 1024
    by_guest, by_vmm = _known(one.blackout_guest_s), _known(one.blackout_vmm_s)
    return {
        "first_touch_p50_us": quantile(slow, 0.50),
        "first_touch_p90_us": quantile(slow, 0.90),
        "first_touch_p99_us": quantile(slow, 0.99),
        "first_touch_max_us": one.longest_us,
        "waits": count(slow),
        "blocked_s": total_s(slow),
        "throughput_gib_s": one.postcopy_bytes / GIB / one.postcopy_s if one.postcopy_s > 0 else math.nan,
        "whole_gib_s": moved_gib / _known(one.total_s),
        # The guest sees less if its counter stops with it.
        "blackout_ms": max(by_guest, by_vmm) * 1e3,
        "blackout_guest_ms": by_guest * 1e3,
        "blackout_vmm_ms": by_vmm * 1e3,
        "cpu_s_per_gib": one.machinery_cpu_s / moved_gib,
        "vcpu_cpu_s_per_gib": one.vcpu_cpu_s / moved_gib,
        **{f"handler_{q}_us": handler.get(q, math.nan) for q in ("p50", "p90", "p99", "max")},
        "vmm_blocked_s": _known(one.vmm_blocked_s),
    }


def middle(values: Iterable[float]) -> float:
    """The median of those that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Least and most of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return (min(known), max(known)) if known else (math.nan, math.nan)


def pairs(ours: Iterable[Round], theirs: Iterable[Round]) -> list[tuple[Round, Round]]:
    """Rounds that ran one right after the other, ours first; a pair with a void half is left out."""
    numbered = {one.number: one for one in ours}
    return [(numbered[one.number - 1], one) for one in theirs if one.number - 1 in numbered]


def ratios(values: Iterable[tuple[float, float]]) -> list[float]:
    """Of each two; without those where there is nothing to divide."""
    return [a / b for a, b in values if b > 0 and not math.isnan(a)]
