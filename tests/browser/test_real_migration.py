"""The dashboards of two real daemons, looked at while a guest with memory errors moves between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.chromium import Findings, watch_dashboard
from tests.support.scenario.harness import cast, pages_of, shape, told, two_hosts, unique
from vmferry.demo.course import Course
from vmferry.demo.patience import patient
from vmferry.demo.stage import until
from vmferry.model.migration import Phase
from vmferry.units import MIB

BAD = 4
LATE = 2
LOOK_S = patient(90.0)
"""For Chromium to start on a busy machine, and for the guest to move."""


class Watch:
    """A browser on one dashboard.

    Its thread writes `at_live` once: the contents of the page when it first follows the daemon and shows a VM. It
    writes `errors` at each look. The test reads both.
    """

    def __init__(self, program: str, directory: Path, port: int, enough: Callable[[Findings], bool]) -> None:
        directory.mkdir()
        self.at_live: tuple[int, frozenset[tuple[str, str]]] | None = None
        self.errors: frozenset[tuple[str, str]] = frozenset()
        self._enough = enough
        self._over = False
        look = asyncio.to_thread(
            watch_dashboard,
            program,
            directory / "profile",
            f"http://127.0.0.1:{port}/",
            self._look,
            timeout_s=LOOK_S,
        )
        self._task = asyncio.create_task(look)

    def _look(self, seen: Findings) -> bool:
        """The first event only repeats the picture: a page that has had it follows the daemon."""
        self.errors = frozenset(seen.errors)
        if self.at_live is None and seen.live == "live" and seen.updates > 0 and seen.vms:
            self.at_live = (seen.updates, self.errors)
        return self._over or self._enough(seen)

    async def shows(self, what: str, condition: Callable[[Watch], bool]) -> None:
        """Waits until a look shows it; a browser that has ended says why."""

        async def met() -> bool:
            if self._task.done():
                raise AssertionError(f"looked in vain for {what}: {self._task.result()}")
            return condition(self)

        await until(what, met, LOOK_S)

    async def findings(self) -> Findings:
        return await self._task

    async def end(self) -> None:
        """Always lets go of the browser."""
        self._over = True
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.timeout(300)
async def test_both_dashboards_show_the_move(
    programs: object, uffd_poison: object, chromium: str, tmp_path: Path
) -> None:
    vm = unique("dashboard")
    async with two_hosts() as pair:
        course = Course(await cast(pair, vm, "process", shape(96 * MIB, vcpus=2, workload="random")))
        bad = (await pages_of(course))[::1000][:BAD]
        early, late = bad[:-LATE], bad[-LATE:]
        await course.poison_before(told(early, True))
        shown = {(vm, f"{gpa:#x}") for gpa in bad}
        shown_late = {(vm, f"{gpa:#x}") for gpa in late}

        def left(seen: Findings) -> bool:
            return Phase.COMPLETED in seen.phases.get(vm, []) and shown <= seen.errors.keys()

        def arrived(seen: Findings) -> bool:
            return "COMPLETED" in seen.outcomes.get(vm, []) and shown <= seen.errors.keys()

        home = Watch(chromium, tmp_path / "home", pair.home.place.ops_port, left)
        away = Watch(chromium, tmp_path / "away", pair.away.place.ops_port, arrived)
        try:
            for name, watch in (("home", home), ("away", away)):
                await watch.shows(f"the live dashboard of {name}", lambda watch: watch.at_live is not None)
            await course.poison_before(told(late, True))
            await home.shows("the errors that are new", lambda watch: shown_late <= watch.errors)
            await course.move(vm, pair.away.place.peer)
            source, destination = await asyncio.gather(home.findings(), away.findings())
        finally:
            await asyncio.gather(home.end(), away.end())
    assert source.phases[vm][-1] == "COMPLETED"
    assert destination.outcomes[vm][-1] == "COMPLETED"
    assert "MIGRATING_IN" in destination.vms[vm] or "RUNNING" in destination.vms[vm]
    assert shown <= source.errors.keys()
    assert shown <= destination.errors.keys()
    assert all(error[3] == "1" for key, error in destination.errors.items() if key in shown), "one move, one hop"
    assert home.at_live is not None
    assert away.at_live is not None
    assert shown - shown_late <= home.at_live[1], "known before the page was opened"
    assert not shown_late & home.at_live[1], "these came by an event"
    assert not shown & away.at_live[1], "these came with the guest, by an event"
    assert source.updates > home.at_live[0]
    assert destination.updates > away.at_live[0]
    assert source.problems == destination.problems == []
