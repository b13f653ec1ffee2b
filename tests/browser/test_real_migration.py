"""The dashboards of two real daemons, looked at while a guest with memory errors moves between them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from chromium import Findings, watch_dashboard

sys.path.append(str(Path(__file__).parents[1] / "scenario"))
from harness import cast, pages_of, shape, told, two_hosts, unique

from vmferry.demo.course import Course
from vmferry.migration.model import Phase
from vmferry.units import MIB

BAD = 4
LOOK_S = 90.0


@pytest.mark.timeout(240)
async def test_both_dashboards_show_the_move(
    programs: object, uffd_poison: object, chromium: str, tmp_path: Path
) -> None:
    vm = unique("dashboard")
    async with two_hosts() as pair:
        course = Course(await cast(pair, vm, "process", shape(96 * MIB, vcpus=2, workload="random")))
        bad = (await pages_of(course))[::1000][:BAD]
        await course.poison_before(told(bad, True))
        shown = {(vm, f"{gpa:#x}") for gpa in bad}

        def left(seen: Findings) -> bool:
            return Phase.COMPLETED in seen.phases.get(vm, []) and shown <= seen.errors.keys()

        def arrived(seen: Findings) -> bool:
            return "COMPLETED" in seen.outcomes.get(vm, []) and shown <= seen.errors.keys()

        def look(port: int, name: str, until: object) -> asyncio.Task[Findings]:
            profile = tmp_path / name / "profile"
            profile.parent.mkdir()
            url = f"http://127.0.0.1:{port}/"
            return asyncio.create_task(
                asyncio.to_thread(watch_dashboard, chromium, profile, url, until, timeout_s=LOOK_S)  # type: ignore[arg-type]
            )

        home = look(pair.home.place.ops_port, "home", left)
        away = look(pair.away.place.ops_port, "away", arrived)
        while not all(_looks(tmp_path / name) or task.done() for name, task in (("home", home), ("away", away))):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await course.move(vm, pair.away.place.peer)
        source, destination = await asyncio.gather(home, away)
    assert source.phases[vm][-1] == "COMPLETED"
    assert destination.outcomes[vm][-1] == "COMPLETED"
    assert "MIGRATING_IN" in destination.vms[vm] or "RUNNING" in destination.vms[vm]
    assert shown <= source.errors.keys()
    assert shown <= destination.errors.keys()
    assert all(error[3] == "1" for key, error in destination.errors.items() if key in shown), "one move, one hop"
    assert source.updates > 0
    assert destination.updates > 0
    assert source.problems == destination.problems == []


def _looks(directory: Path) -> bool:
    """Chromium has started: the migration must not be over before it looks."""
    return (directory / "profile/DevToolsActivePort").exists()
