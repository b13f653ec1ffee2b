"""Steps of which none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def gather_or_cancel(*steps: Coroutine[Any, Any, object]) -> None:
    """All of them at the same time; when one fails the others are cancelled, and it raises once they have ended:
    of errors that come at once that of the first step."""
    await _until(asyncio.FIRST_EXCEPTION, steps)


async def race(*steps: Coroutine[Any, Any, object]) -> None:
    """Returns when the first of them has ended, or raises its error; the others are cancelled, and have ended too."""
    await _until(asyncio.FIRST_COMPLETED, steps)


async def _until(when: str, steps: Sequence[Coroutine[Any, Any, object]]) -> None:
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.wait(tasks, return_when=when)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
