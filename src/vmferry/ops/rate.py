"""Rates of growing counts over a short sliding window. The caller gives the time. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_S = 3.0
LEAST_S = 0.2
"""The least distance of two samples. A nearer sample replaces the one before."""


class Rates:
    """The bytes per second of each key, from its samples of the last `WINDOW_S`."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, int]]] = {}

    def observe(self, key: str, value: int, at_s: float) -> float:
        """Adds a sample and returns the rate: 0.0 until two samples are far enough apart. A count that fell, by a new
        move under the same key, starts anew.
        """
        samples = self._samples.setdefault(key, deque())
        if samples and value < samples[-1][1]:
            samples.clear()
        while len(samples) > 1 and at_s - samples[1][0] >= WINDOW_S:
            samples.popleft()
        if len(samples) > 1 and at_s - samples[-2][0] < LEAST_S:
            samples[-1] = (at_s, value)
        else:
            samples.append((at_s, value))
        span = at_s - samples[0][0]
        return (value - samples[0][1]) / span if span >= LEAST_S else 0.0

    def keep(self, keys: set[str]) -> None:
        """Drops all keys but these."""
        for key in self._samples.keys() - keys:
            del self._samples[key]
