"""Things that go away in the middle of a postcopy: the daemons, the source's pager.

Postcopy is held open by stopping the source's pager (SIGSTOP) as soon as the guest runs on the destination: faults
wait. Where all pages had come before it stopped, another guest is moved: how fast this machine is decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.support.scenario.harness import (
    SOON_S,
    Pair,
    cast,
    ended,
    goes_on,
    pagers,
    reaches,
    report,
    shape,
    told,
    two_hosts,
)
from vmferry.client.refusal import RefusedError
from vmferry.demo.course import Cast, Course, workload_pages
from vmferry.demo.stage import until
from vmferry.demo.verdict import problems
from vmferry.units import MIB
from vmferry.v1 import migrations_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

LARGE = 512 * MIB
"""Long enough on its way that postcopy can be caught in the middle."""
ATTEMPTS = 5


@pytest_asyncio.fixture(loop_scope="module")
async def patient(programs, uffd_poison):
    """Two hosts; their pagers wait a minute for a page."""
    pages = {"pages": "demand_timeout_s = 60.0"}
    async with two_hosts(pages, pages) as pair:
        yield pair


@pytest_asyncio.fixture(loop_scope="module")
async def hasty(programs, uffd_poison):
    """Two hosts; their pagers wait a second for a page."""
    pages = {"pages": "demand_timeout_s = 1.0"}
    async with two_hosts(pages, pages) as pair:
        yield pair


@dataclass
class Held:
    """A migration that is held in postcopy: its source pager is stopped."""

    vm: str
    players: Cast
    course: Course
    pager: int

    def release(self) -> None:
        os.kill(self.pager, signal.SIGCONT)


async def hold(pair: Pair, vm: str) -> Held:
    """Starts a migration and stops the source's pager in the middle of postcopy."""
    for attempt in range(ATTEMPTS):
        held = await _try_to_hold(pair, f"{vm}-{attempt}")
        if held is not None:
            return held
        await pair.stage.dismiss_guests()
    raise AssertionError(f"{ATTEMPTS} times all pages had arrived before the source's pager could be stopped")


async def _try_to_hold(pair: Pair, vm: str) -> Held | None:
    players = await cast(pair, vm, "process", shape(LARGE, workload="random", write_percent=50))
    course = Course(players)
    pages = workload_pages((await pair.home_api.machine(vm)).layout)
    await course.poison_before(told(pages[-8:], False))
    course.at_source = await report(players.source)
    await pair.home_api.create(vm, vm, pair.away.place.peer)
    await reaches(pair.home_api, vm, migrations_pb2.PHASE_POSTCOPY)
    await report(players.destination)  # so that the pages of the report are there and reading them does not wait
    running = pagers(pair.stage.root / pair.home.name, vm)
    if not running:
        return None
    (pager,) = running
    os.kill(pager, signal.SIGSTOP)
    try:
        await asyncio.sleep(0.3)  # what was under way arrives
        caught = (await pair.away_api.machine(vm)).progress.absent > 0
    except BaseException:
        os.kill(pager, signal.SIGCONT)
        raise
    held = Held(vm, players, course, pager)
    if caught:
        return held
    held.release()
    return None


async def completes(pair: Pair, held: Held) -> None:
    held.course.migration = await ended(pair.home_api, held.players.source.vm)
    assert problems(await held.course.judge(SOON_S)) == []


@pytest.mark.parametrize("which", ["home", "away", "both"])
async def test_daemons_die_and_come_back_and_the_guest_is_served_on(patient: Pair, vm, which):
    hosts = {"home": [patient.home], "away": [patient.away], "both": [patient.home, patient.away]}[which]
    held = await hold(patient, vm)
    try:
        await asyncio.gather(*(host.kill() for host in hosts))
    finally:
        held.release()
    served = await goes_on(held.players.destination)
    assert served.wrong_bytes == 0
    before = {host.name: set(pagers(patient.stage.root / host.name, held.vm)) for host in (patient.home, patient.away)}
    await asyncio.gather(*(host.start() for host in hosts))
    for host in hosts:
        new = set(pagers(patient.stage.root / host.name, held.vm)) - before[host.name]
        assert not new, f"{host.name} started another pager instead of finding its own"
    await completes(patient, held)


async def test_a_lost_link_pauses_the_job_and_the_guests_threads_wait(patient: Pair, vm):
    """The source's pager dies: nothing reads as zeros, the job says why it waits, the guest's threads wait."""
    held = await hold(patient, vm)
    os.kill(held.pager, signal.SIGKILL)
    await _is_paused(patient, held, "PAGER_FAILED")
    cause = f"the source's pager ({patient.home.name}, pid {held.pager}) was killed by SIGKILL"

    async def told_alike() -> bool:
        found = [*await patient.home_api.list_problems(), *await patient.away_api.list_problems()]
        return [one.cause for one in found if one.vm == held.vm] == [cause, cause]

    await until("both hosts to name the killed pager", told_alike, SOON_S)
    (arriving,) = [one async for one in patient.away_api.list_incoming() if one.vm == held.vm]
    assert (arriving.phase, arriving.reason_code) == (migrations_pb2.PHASE_POSTCOPY_PAUSED, "PAGER_FAILED")
    assert arriving.progress.waiting_faults > 0
    assert arriving.progress.oldest_fault_since_us > 0
    events = (await patient.away_api.migration(held.vm)).events
    assert {event.host for event in events} == {patient.home.name, patient.away.name}


async def test_a_source_that_stays_silent_pauses_the_job(hasty: Pair, vm):
    """The connection stands, and no page comes."""
    held = await hold(hasty, vm)
    try:
        await _is_paused(hasty, held, "LINK_DOWN")
    finally:
        held.release()


async def _is_paused(pair: Pair, held: Held, reason_code: str) -> None:
    vm = held.vm
    paused = await reaches(pair.home_api, vm, migrations_pb2.PHASE_POSTCOPY_PAUSED)
    assert paused.reason

    async def explained() -> bool:
        return (await pair.home_api.migration(vm)).reason_code == reason_code

    await until(f"the reason {reason_code}", explained, SOON_S)
    guest = held.players.destination

    async def stands_still() -> bool:
        first = (await report(guest)).touches
        await asyncio.sleep(0.3)
        return (await report(guest)).touches == first

    await until("every vCPU to wait for a page", stands_still, SOON_S)
    assert guest.process.alive
    assert (await report(guest)).wrong_bytes == 0
    assert (await pair.home_api.migration(vm)).phase == migrations_pb2.PHASE_POSTCOPY_PAUSED
    with pytest.raises(RefusedError) as refused:
        await pair.home_api.cancel(vm)
    assert refused.value.reason == "PAST_NO_RETURN"
