"""Steps of which none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """All of them at the same time; returns, or raises the first step's error, when every one has ended.

    A step goes on when another has failed: what it makes durable is known to be so before anybody goes back.
    """
    ended = await asyncio.gather(*steps, return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error


async def all_or_none(*steps: Coroutine[Any, Any, object]) -> None:
    """All of them at the same time; when one fails the others are cancelled, and it raises once they have ended."""
    await _until(asyncio.FIRST_EXCEPTION, steps)


async def sooner(*steps: Coroutine[Any, Any, object]) -> None:
    """Returns when the first of them has ended, or raises its error; the others are cancelled, and have ended too."""
    await _until(asyncio.FIRST_COMPLETED, steps)


async def _until(when: str, steps: Sequence[Coroutine[Any, Any, object]]) -> None:
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=when)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
