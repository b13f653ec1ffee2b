"""Steps done at the same time."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.migration.together import together


async def test_the_others_end_before_the_first_error_is_raised() -> None:
    ended: list[str] = []
    gate = asyncio.Event()

    async def fails() -> None:
        gate.set()
        raise ValueError("first")

    async def goes_on() -> None:
        await gate.wait()
        await asyncio.sleep(0)
        ended.append("second")

    with pytest.raises(ValueError, match="first"):
        await together(goes_on(), fails())
    assert ended == ["second"]


async def test_a_cancellation_ends_all() -> None:
    ended: list[str] = []

    async def waits(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    both = asyncio.create_task(together(waits("a"), waits("b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert ended == ["a", "b"]
