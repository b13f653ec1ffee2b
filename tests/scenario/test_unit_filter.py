"""A move where daemons and pagers may make the system calls that the systemd unit allows, and no other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support import unit_filter
from tests.support.scenario.harness import SOON_S, cast, goes_on, pagers, pages_of, shape, told, two_hosts
from vmferry.demo import stage
from vmferry.demo.course import Course
from vmferry.demo.programs import daemon_command
from vmferry.demo.stage import until
from vmferry.units import MIB

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(unit_filter.missing_tool()), reason=unit_filter.missing_tool()),
]


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
async def test_the_unit_allows_every_system_call_of_a_move(
    programs, uffd_poison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backing: str
) -> None:
    confined = unit_filter.launcher(tmp_path, unit_filter.allowed_calls(), daemon_command())
    monkeypatch.setattr(stage, "daemon_command", lambda: confined)
    async with two_hosts() as pair:
        players = await cast(pair, "web", "process", shape(48 * MIB, backing=backing))
        course = Course(players, idle=False)
        await course.poison_before(told((await pages_of(course))[:4], True))
        moved = await course.move("m1", pair.away.place.peer, ())
        assert moved.reason == ""
        report = await goes_on(players.destination)
        assert report.wrong_bytes == 0
        await until("the source's pager to end", lambda: _gone(pair.stage.root / pair.home.name), SOON_S)


async def _gone(directory: Path) -> bool:
    await asyncio.sleep(0)
    return not pagers(directory)


async def test_a_call_that_the_unit_does_not_allow_ends_the_process(tmp_path: Path) -> None:
    """Shows that the filter of the test above can refuse."""
    command = unit_filter.launcher(tmp_path, unit_filter.allowed_calls() - {"uname"}, ["uname"])
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() < 0
