"""Steps of which none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def together(*steps: Coroutine[Any, Any, None]) -> None:
    """All of them at the same time; returns, or raises the first step's error, when every one has ended.

    A step goes on when another has failed: what it makes durable is known to be so before anybody goes back.
    """
    ended = await asyncio.gather(*steps, return_exceptions=True)
    for error in ended:
        if error is not None:
            raise error
