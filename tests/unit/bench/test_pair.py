"""Where the ends of a pair run."""

from __future__ import annotations

import os

import pytest
from vmferry_bench.pair import ANYWHERE, Ends, apart


@pytest.mark.parametrize(("cpus", "ends"), [({3}, ANYWHERE), ({7, 2, 5}, Ends(source="2", destination="5"))])
def test_the_ends_share_no_cpu_where_there_are_two(monkeypatch: pytest.MonkeyPatch, cpus: set[int], ends: Ends) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)
    assert apart() == ends
