"""The gate asks grpc for the peer of a call only while the call lasts: later grpc dereferences a null pointer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from vmferry.security.gate import Gate, Records, Rule


class Call:
    """A servicer context that grpc has freed once the call has ended."""

    def __init__(self) -> None:
        self.ended = False
        self.asked = 0

    def peer(self) -> str:
        assert not self.ended, "grpc ends the process here"
        self.asked += 1
        return "ipv4:127.0.0.1:1"

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.PERMISSION_DENIED


class Noted:
    def __init__(self) -> None:
        self.notes: list[Any] = []

    def note(self, *what: Any) -> None:
        self.notes.append(what)


@pytest.fixture
def audit() -> Noted:
    return Noted()


@pytest.fixture
def gate(audit: Noted) -> Gate:
    caller: Any = lambda peer: SimpleNamespace(address=peer)  # noqa: E731
    places: Any = Records(audit, Noted())  # type: ignore[arg-type]
    return Gate("api", caller, Rule(problem=lambda caller, method: None, changes=lambda method: True), places)


async def test_a_stream_whose_caller_went_away(gate: Gate, audit: Noted) -> None:
    async def watch(request: object, context: Call) -> AsyncIterator[int]:
        yield 1
        yield 2

    call: Any = Call()
    items: Any = gate._guarded("/S/Watch", watch)(object(), call)
    assert await anext(items) == 1
    call.ended = True
    await items.aclose()
    assert call.asked == 1
    assert audit.notes[0][0]["from"] == "ipv4:127.0.0.1:1"


async def test_a_call_that_ends_while_it_is_answered(gate: Gate, audit: Noted) -> None:
    call: Any = Call()

    async def answer(request: object, context: Call) -> int:
        context.ended = True
        await asyncio.sleep(0)
        return 7

    assert await gate._guarded("/S/Get", answer)(object(), call) == 7
    assert call.asked == 1
    assert len(audit.notes) == 1
