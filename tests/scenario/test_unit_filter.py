"""A move where daemons and pagers have the system calls and the capabilities of the systemd unit, and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import unit_filter
from tests.support.scenario.harness import SOON_S, cast, pagers, pages_of, shape, told, two_hosts
from vmferry.demo import stage
from vmferry.demo.course import Course
from vmferry.demo.programs import daemon_command
from vmferry.demo.stage import until
from vmferry.demo.verdict import problems
from vmferry.units import MIB

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(unit_filter.missing_tool()), reason=unit_filter.missing_tool()),
]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.usefixtures("programs", "uffd_poison")
async def test_the_unit_allows_every_system_call_of_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: str, known: bool
) -> None:
    """Poison that nobody reported is found too, though the pager may not see the kind of a page table entry."""
    confined = unit_filter.launcher(tmp_path, unit_filter.allowed_calls(), daemon_command())
    monkeypatch.setattr(stage, "daemon_command", lambda: confined)
    async with two_hosts() as pair:
        workload = "random" if known else "idle"
        players = await cast(pair, "web", "process", shape(48 * MIB, backing=backing, workload=workload))
        course = Course(players, idle=not known)
        await course.poison_before(told((await pages_of(course))[:4], known))
        moved = await course.move("m1", pair.away.place.peer)
        assert moved.reason == ""
        assert problems(await course.judge(SOON_S)) == []
        await until("the source's pager to end", lambda: _gone(pair.stage.root / pair.home.name), SOON_S)


async def _gone(directory: Path) -> bool:
    await asyncio.sleep(0)
    return not pagers(directory)


async def test_a_call_that_the_unit_does_not_allow_ends_the_process(tmp_path: Path) -> None:
    """Shows that the filter of the test above can refuse."""
    command = unit_filter.launcher(tmp_path, unit_filter.allowed_calls() - {"uname"}, ["uname"])
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() < 0
