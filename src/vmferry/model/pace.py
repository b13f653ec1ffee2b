"""The one estimator of a moving VM's pace: rate, remaining time, last page, recent latency. Pure.

The destination's daemon feeds it each status of its pager. Both hosts show its results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from vmferry.model.latency import between
from vmferry.model.migration import Latency, PageProgress

RATE_S = 3.0
"""The rate is that of this window. A push limit lets pages through in bursts, which the window evens out."""
RECENT_S = 10.0
SAME_WAIT_US = 50_000
"""Two begins of the oldest wait that differ by less are one: the pager tells ages, which travel."""


@dataclass(slots=True)
class Pace:
    """The samples of one moving VM."""

    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)
    """(monotonic seconds, bytes, pages)."""
    _touches: deque[tuple[float, Latency]] = field(default_factory=deque)
    _oldest_us: int = 0
    _last_page_us: int = 0

    def observe(self, progress: PageProgress, now_s: float, now_us: int) -> PageProgress:
        """The progress with the estimates of this moment. `now_s` is monotonic, `now_us` Unix microseconds."""
        arrived = progress.arrived
        if self._samples and arrived != self._samples[-1][2]:
            self._last_page_us = now_us
        if self._samples and progress.bytes_received < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now_s, progress.bytes_received, arrived))
        while len(self._samples) > 2 and now_s - self._samples[1][0] >= RATE_S:
            self._samples.popleft()
        rate, pages_a_s = self._rates()
        return replace(
            progress,
            oldest_wait_us=0,
            oldest_fault_since_us=self._oldest(progress, now_us),
            last_page_us=self._last_page_us or progress.last_page_us,
            rate_bytes_per_s=rate,
            remaining_s=progress.absent / pages_a_s if pages_a_s > 0 else 0.0,
            recent_first_touch=self._recent(progress.first_touch, now_s),
        )

    def _rates(self) -> tuple[float, float]:
        (first_s, first_bytes, first_pages), (last_s, last_bytes, last_pages) = self._samples[0], self._samples[-1]
        span_s = last_s - first_s
        if span_s <= 0:
            return 0.0, 0.0
        return float(round((last_bytes - first_bytes) / span_s)), max(0, last_pages - first_pages) / span_s

    def _oldest(self, progress: PageProgress, now_us: int) -> int:
        if not progress.waiting_faults:
            self._oldest_us = 0
        else:
            since_us = now_us - progress.oldest_wait_us
            if abs(since_us - self._oldest_us) > SAME_WAIT_US:
                self._oldest_us = since_us
        return self._oldest_us

    def _recent(self, whole: Latency, now_s: float) -> Latency:
        self._touches.append((now_s, whole))
        while len(self._touches) > 2 and now_s - self._touches[1][0] >= RECENT_S:
            self._touches.popleft()
        return between(self._touches[0][1], whole)


def stopped(progress: PageProgress) -> PageProgress:
    """The progress of a VM that no longer moves: no pace, and nobody waits."""
    return replace(
        progress,
        waiting_faults=0,
        oldest_fault_since_us=0,
        rate_bytes_per_s=0.0,
        remaining_s=0.0,
        recent_first_touch=Latency(),
    )
