"""Steps that run at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def gather_or_cancel(*steps: Coroutine[Any, Any, object]) -> None:
    """Runs all steps concurrently. If one fails, cancels the others, waits for them, and raises the error.

    If several fail together, raises the error of the first argument.
    """
    await _until(asyncio.FIRST_EXCEPTION, steps)


async def race(*steps: Coroutine[Any, Any, object]) -> None:
    """Returns when the first step has ended, or raises its error. The other steps are cancelled and have ended too."""
    await _until(asyncio.FIRST_COMPLETED, steps)


async def to_the_end(step: Coroutine[Any, Any, None]) -> None:
    """Runs a step that must not stop half-way. A cancelled caller waits for its end, and is cancelled then."""
    task = asyncio.ensure_future(step)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError from None if task.cancelled() else task.exception()
    task.result()


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


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that is no group itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
