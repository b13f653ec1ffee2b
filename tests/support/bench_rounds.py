"""Rounds made up for tests."""

from __future__ import annotations

from vmferry_bench.plan import guest, idle
from vmferry_bench.shape import Bucket, Round, Shape

GUEST = guest("memfd")
IDLE = idle("memfd")


def a_round(side: str, shape: Shape = GUEST, wait_us: float = 1000.0, faults: str = "", **more: object) -> Round:
    """One with 100 waits in one bucket that ends at `wait_us`, and 50 touches that did not wait."""
    buckets: list[Bucket] = [(0.5, 0.6, 50), (wait_us * 0.9, wait_us, 100)]
    values: dict[str, object] = {
        "side": side,
        "shape": shape,
        "number": 0,
        "buckets": buckets,
        "longest_us": wait_us,
        "blackout_guest_s": 0.01,
        "blackout_vmm_s": 0.009,
        "total_s": 1.0,
        "postcopy_s": 0.5,
        "postcopy_bytes": 512 << 20,
        "machinery_cpu_s": 0.25,
        "vcpu_cpu_s": 0.5,
        "wrong_bytes": 0,
        "faults": faults,
    }
    return Round(**(values | more))  # type: ignore[arg-type]
