# ruff: noqa: ASYNC110 what is waited for rings no bell
"""Processors of either end do not sleep while a guest asks for pages, and may again behind that."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.contract.destination_rig import Destination
from tests.support.contract.page_source import PAGES
from tests.support.contract.source_rig import PATIENCE_S, source_of, urgent
from vmferry.daemon.processors import LATENCY_FILE


@pytest.fixture
def latency_file() -> None:
    try:
        os.close(os.open(LATENCY_FILE, os.O_WRONLY))
    except OSError as error:
        pytest.skip(f"processors cannot be kept awake by this process: {error}")


def is_held(pid: int) -> bool:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if link.readlink() == LATENCY_FILE:
                return True
        except FileNotFoundError:
            continue
    return False


async def awake_only_while(pid: int, touch: Callable[[int], Awaitable[object]], times: int) -> None:
    """`touch` asks for a page; it may have to do so more than once, since the request is over so soon."""
    assert not is_held(pid)
    for number in range(times):
        await touch(number)
        if is_held(pid):
            break
    else:
        pytest.fail(f"{times} pages were asked for, and processors might have slept")
    async with asyncio.timeout(PATIENCE_S):
        while is_held(pid):
            await asyncio.sleep(0.005)


async def test_on_the_destination(anonymous: Destination, latency_file: None) -> None:
    await anonymous.attach()
    await anonymous.connect()
    await awake_only_while(anonymous.pager.pid, anonymous.vmm.touch, PAGES)


async def test_on_the_source(pager_program: str, tmp_path: Path, latency_file: None) -> None:
    async with source_of(pager_program, "memfd", tmp_path) as source:
        await source.freeze()
        async with source.opened(urgent()) as lane:

            async def ask(_number: int) -> None:
                lane.ask(0)
                assert await lane.frame() is not None

            await awake_only_while(source.pager.pid, ask, 10_000)
