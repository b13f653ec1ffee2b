"""Two hosts in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from vmferry.testing.host import Pair, make_pair


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """At the end of every test: I3 and I4 held at every moment."""
    made = await make_pair()
    yield made
    for host in (made.a, made.b):
        await host.kill()
    assert made.broken == []
