"""The waits of one blackout on its source, by name: a blackout that takes too long names what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmferry.errors import Reason, VmferryError
from vmferry.model.migration import BlackoutPart


class Blackout:
    """The steps that have begun and not ended."""

    def __init__(self, vm: str, host: str) -> None:
        self._vm = vm
        self._host = host
        self._waits: list[str] = []
        self._parts: list[BlackoutPart] = []

    @contextmanager
    def waits_for(self, whom: str) -> Iterator[None]:
        """One step. A step that fails or is cancelled stays among the waits."""
        self._waits.append(whom)
        began_s = time.monotonic()
        yield
        self._waits.remove(whom)
        self._parts.append(BlackoutPart(whom, time.monotonic() - began_s))

    def parts(self) -> tuple[BlackoutPart, ...]:
        """The steps that have ended well, in the order of their ends."""
        return tuple(self._parts)

    def exceeded(self, limit_s: float) -> VmferryError:
        """The error of a blackout that is longer than its limit."""
        return VmferryError(
            Reason.DOWNTIME_EXCEEDED,
            f"{self._vm} was stopped for {limit_s:g} s on {self._host}, waiting for {' and '.join(self._waits)}.",
            "Look there for what hangs, or raise timeouts.downtime_s.",
        )
