# ruff: noqa: ASYNC110 these tests poll the fakes, which have no signal
"""Parts of the tests that move a VM between two hosts in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vmferry.demo.patience import patient

POSTCOPY = frozenset({"POSTCOPY"})
PAUSED = frozenset({"POSTCOPY_PAUSED"})


def before(steps: list[str], one: str, other: str) -> bool:
    """Whether the first of one step comes before the first of the other."""
    return steps.index(one) < steps.index(other)


async def come(so: Callable[[], bool]) -> None:
    """Polls a condition until it holds."""
    async with asyncio.timeout(patient(20)):
        while not so():
            await asyncio.sleep(0.001)
