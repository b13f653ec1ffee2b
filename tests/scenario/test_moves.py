"""A guest moves, over accelerators, backings, ways to go bad, and workloads; the guest is the judge.

Every accelerator and backing meets every way to go bad; the workloads go round so that each meets each accelerator,
each backing and each way.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tests.support.scenario.combinations import ACCELS, BACKINGS, COMBINATIONS
from tests.support.scenario.harness import (
    SOON_S,
    Pair,
    cast,
    differing,
    goes_on,
    pages_of,
    read_memory,
    report,
    shape,
    told,
)
from vmferry.demo.course import Cast, Course
from vmferry.demo.patience import patient
from vmferry.demo.stage import until
from vmferry.demo.verdict import healed, problems
from vmferry.units import MIB
from vmferry.v1 import common_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

A_WHILE_S = patient(5.0)
"""For the guest to touch every page again; one that takes pauses touches fewer, and is judged by those."""
BAD = 6
DURING = 24


@pytest.mark.parametrize(
    ("accel", "combination"),
    [pytest.param(row[0], row[1:], id="-".join(row)) for row in COMBINATIONS],
    indirect=["accel"],
)
async def test_move(pair: Pair, vm, accel, combination):
    backing, way, workload = combination
    guest_shape = shape(96 * MIB if way == "during" else 48 * MIB, backing=backing, workload=workload, vcpus=2)
    players = await cast(pair, vm, accel, guest_shape)
    course = Course(players, idle=workload == "idle")
    chosen = random.Random(vm).sample(await pages_of(course), BAD + DURING)
    if way in ("known", "unknown"):
        await course.poison_before(told(chosen[:BAD], way == "known"))
    during = told(chosen[BAD:], True) if way == "during" else ()
    moved = await course.move(vm, pair.away.place.peer, during)
    evidence = await course.judge(A_WHILE_S)
    assert problems(evidence) == []
    assert moved.downtime_s > 0
    if way in ("known", "unknown"):
        assert {error.gpa for error in course.ledger} == course.bad_before
    if way == "known":
        assert {error.hop for error in course.ledger} == {1}
    if way == "unknown" and workload == "idle":
        assert {error.origin for error in course.ledger} == {common_pb2.ERROR_ORIGIN_READ}
    if way == "during":
        assert healed(evidence) | {error.gpa for error in course.ledger} >= course.bad_during
    if way == "afterwards":
        await _goes_bad_afterwards(course, chosen[:BAD], workload)


@pytest.mark.parametrize("accel", ACCELS, indirect=True)
@pytest.mark.parametrize("backing", BACKINGS)
async def test_each_region_has_a_userfaultfd_of_its_own(pair: Pair, vm, accel, backing):
    """Faults and poison are of all regions."""
    source = await pair.stage.guest(vm, pair.home, accel, shape(96 * MIB, backing=backing), ("--regions", "3"))
    destination = await pair.stage.guest(vm, pair.away, accel, None, ("--uffd-per-region",))
    await pair.stage.warm(source)
    course = Course(Cast(source, destination, pair.home_api, pair.away_api))
    pages = await pages_of(course)
    regions = await source.admin.regions()
    assert len(regions) == 3
    bad = [next(gpa for gpa in pages if region.gpa + MIB <= gpa < region.gpa + region.size) for region in regions]
    await course.poison_before(told(bad, True))
    await course.move(vm, pair.away.place.peer)
    assert problems(await course.judge(A_WHILE_S)) == []
    assert {error.gpa for error in course.ledger} == set(bad)
    open_files = await asyncio.to_thread(open_files_of, destination.process.pid)
    assert open_files.count("anon_inode:[userfaultfd]") == 3


def open_files_of(pid: int) -> list[str]:
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


async def _goes_bad_afterwards(course: Course, pages: list[int], workload: str) -> None:
    """On the destination, when all is over: one machine check a page that is touched, and the ledger knows."""
    guest = course.cast.destination
    assert await guest.admin.inject(told(pages, True)) == [""] * len(pages)

    async def in_ledger() -> bool:
        known = {error.gpa async for error in course.cast.away.memory_errors(guest.vm)}
        return known == set(pages)

    await until("the ledger to know", in_ledger, SOON_S)
    if workload == "idle":
        return

    async def told_to_the_guest() -> bool:
        return {check.gpa for check in (await report(guest)).machine_checks} == set(pages)

    await until("the guest to stumble over each page", told_to_the_guest, SOON_S)
    last = await goes_on(guest)
    assert len(last.machine_checks) == len(pages)
    assert last.wrong_bytes == 0


@pytest.mark.parametrize(("accel", "backing"), list(product(ACCELS, BACKINGS)), indirect=["accel"])
async def test_memory_is_the_sources_byte_for_byte(pair: Pair, vm, accel, backing):
    """The guest reads and never writes, so the destination must have the source's memory."""
    players = await cast(pair, vm, accel, shape(backing=backing, write_percent=0))
    course = Course(players)
    before = await read_memory(players.source)
    chosen = random.Random(vm).sample(await pages_of(course), BAD)
    await course.poison_before(told(chosen, False))
    await course.move(vm, pair.away.place.peer)
    evidence = await course.judge(SOON_S)
    after = await read_memory(players.destination)
    assert problems(evidence) == []
    assert differing(before, after, course.bad_before) == []
    assert [gpa for gpa in chosen if after[gpa] is not None] == [], "poisoned pages stay poisoned"


async def test_errors_travel_on_with_the_next_move(pair: Pair, vm):
    """Out and back again: the ledger and the pages stay bad, and nobody is told twice."""
    players = await cast(pair, vm, "process", shape())
    course = Course(players)
    chosen = random.Random(vm).sample(await pages_of(course), BAD)
    await course.poison_before(told(chosen, True))
    await course.move(vm, pair.away.place.peer)
    assert problems(await course.judge(SOON_S)) == []
    again = await pair.stage.guest(vm, pair.home, "process", None)
    back = Course(
        replace(players, source=players.destination, destination=again, home=pair.away_api, away=pair.home_api)
    )
    back.bad_before = course.bad_before
    await back.move(f"{vm}-2", pair.home.place.peer)
    assert problems(await back.judge(SOON_S)) == []
    assert {error.hop for error in back.ledger} == {2}


async def test_an_error_that_the_control_plane_reports_is_poison_on_the_destination(pair: Pair, vm):
    players = await cast(pair, vm, "process", shape(workload="paced"))
    course = Course(players)
    gpa = (await pages_of(course))[100]
    error = await pair.home_api.report_error(vm, gpa)
    assert error.origin == common_pb2.ERROR_ORIGIN_OPERATOR
    course.bad_before = frozenset({gpa})
    await course.move(vm, pair.away.place.peer)
    evidence = await course.judge(SOON_S)
    assert [check.gpa for check in evidence.at_end.machine_checks] == [gpa]
    assert problems(evidence) == []
