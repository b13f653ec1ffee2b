"""Steps done at the same time."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.aio.concurrency import gather_or_cancel, race, to_the_end


async def test_a_cancellation_ends_all() -> None:
    ended: list[str] = []

    async def waits(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    both = asyncio.create_task(gather_or_cancel(waits("a"), waits("b")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both
    assert ended == ["a", "b"]


async def test_all_or_none_does_all() -> None:
    done: list[str] = []

    async def does(name: str) -> None:
        await asyncio.sleep(0)
        done.append(name)

    await gather_or_cancel(does("a"), does("b"))
    assert done == ["a", "b"]


async def test_one_that_fails_ends_the_others_first() -> None:
    ended: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("no")

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("waits")

    with pytest.raises(ValueError, match="no"):
        await gather_or_cancel(waits(), fails())
    assert ended == ["waits"]


async def test_of_errors_that_come_at_once_the_first_steps_is_raised() -> None:
    gate = asyncio.Event()

    async def fails(why: str) -> None:
        await gate.wait()
        raise ValueError(why)

    for _ in range(20):  # a set of tasks would be in another order each time
        gate.clear()
        asyncio.get_running_loop().call_soon(gate.set)
        with pytest.raises(ValueError, match="first"):
            await gather_or_cancel(fails("first"), fails("second"), fails("third"))


async def test_the_sooner_ends_the_later() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails() -> None:
        raise ValueError("no")

    await race(asyncio.sleep(0), waits())
    assert ended == ["waits"]
    with pytest.raises(ValueError, match="no"):
        await race(waits(), fails())
    assert ended == ["waits", "waits"]


async def test_a_cancellation_waits_for_the_end() -> None:
    ended: list[str] = []
    may_end = asyncio.Event()

    async def works() -> None:
        await may_end.wait()
        ended.append("work")

    caller = asyncio.create_task(to_the_end(works()))
    for _ in range(3):
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended == ["work"]


async def test_the_end_of_a_step_raises_its_error() -> None:
    async def fails() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await to_the_end(fails())
