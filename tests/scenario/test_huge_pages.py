"""A guest moves between hosts with different page sizes; the guest is the judge.

A huge page goes bad as a whole. On a destination of 4 KiB pages exactly the source's bad pages are bad; on one of huge
pages the whole page around.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import random
import struct
from pathlib import Path

import pytest

from tests.support.scenario.combinations import KINDS, Kind
from tests.support.scenario.harness import (
    SMALL,
    SOON_S,
    Pair,
    cast,
    differing,
    ended,
    goes_on,
    guest_at_home,
    pages_of,
    read_memory,
    shape,
    told,
    unharmed,
)
from vmferry.demo.admin import Mapped
from vmferry.demo.course import Cast, Course
from vmferry.demo.options import PAYLOAD_BYTES, GuestShape, WaitingShape
from vmferry.demo.stage import until
from vmferry.demo.verdict import problems
from vmferry.units import MIB, PAGE_2M, PAGE_4K
from vmferry.v1 import common_pb2, migrations_pb2

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

MEMORY = 64 * MIB
"""32 huge pages, 8 of them the payload's."""
BAD = 1
THP = Path("/sys/kernel/mm/transparent_hugepage")
PAGEMAP_SCAN = 0xC0606610
"""`_IOWR('f', 16, struct pm_scan_arg)` (Documentation/admin-guide/mm/pagemap.rst)."""
PAGE_IS_HUGE = 1 << 6


def name(kind: Kind) -> str:
    return f"{kind[0]}-{kind[1] // 1024}K"


def made_of(kind: Kind, **more: object) -> GuestShape:
    backing, page_size = kind
    return shape(MEMORY, backing=backing, page_size=page_size, **more)


@pytest.fixture
def reserved(request: pytest.FixtureRequest, kinds: tuple[Kind, Kind]) -> None:
    """Huge pages, where the test needs some."""
    if any(page_size != PAGE_4K for _, page_size in kinds):
        request.getfixturevalue("huge_pages")


def free_huge_pages() -> int:
    """Of 2 MiB, on this host."""
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())


async def test_no_huge_pages_at_the_destination(pair: Pair, vm):
    """The reason says what to set."""
    free = free_huge_pages()
    if free >= SMALL // PAGE_2M:
        pytest.skip(f"this host has {free} huge pages free")
    guest = await guest_at_home(pair, vm)
    await pair.stage.guest(vm, pair.away, "process", WaitingShape(page_size=PAGE_2M))
    await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)
    last = await ended(pair.home_api, f"m-{vm}")
    assert last.reason_code == "DESTINATION_NO_MEMORY"
    assert f"{vm} needs" in last.reason
    assert "in pages of 2 MiB, and this host's pool of 2MB pages has" in last.reason
    assert "nr_hugepages" in last.reason
    await unharmed(pair, guest)


@pytest.mark.parametrize("accel", ["kvm", "process"], indirect=True)
@pytest.mark.parametrize("kinds", [pytest.param(pair, id=f"{name(pair[0])}-to-{name(pair[1])}") for pair in KINDS])
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.usefixtures("reserved")
async def test_a_guest_moves_with_its_bad_pages(pair: Pair, vm, accel, kinds, known):
    source, destination = kinds
    workload = "random" if known else "idle"
    players = await cast(pair, vm, accel, made_of(source, workload=workload), WaitingShape(*destination))
    course = Course(players, idle=workload == "idle")
    await course.poison_before(told(random.Random(vm).sample(await pages_of(course), BAD), known))
    await course.move(vm, pair.away.place.peer)
    evidence = await course.judge(SOON_S)
    assert problems(evidence) == []
    regions = await players.destination.admin.regions()
    assert {(region.page_size, region.size) for region in regions} == {(destination[1], MEMORY)}


@pytest.mark.parametrize("kinds", [pytest.param(pair, id=f"{name(pair[0])}-to-{name(pair[1])}") for pair in KINDS])
@pytest.mark.usefixtures("reserved")
async def test_memory_is_the_sources_byte_for_byte(pair: Pair, vm, kinds):
    """The guest reads and never writes, so the destination must have the source's memory."""
    source, destination = kinds
    players = await cast(pair, vm, "process", made_of(source, write_percent=0), WaitingShape(*destination))
    course = Course(players)
    before = await read_memory(players.source)
    await course.poison_before(told(random.Random(vm).sample(await pages_of(course), BAD), False))
    await course.move(vm, pair.away.place.peer)
    evidence = await course.judge(SOON_S)
    after = await read_memory(players.destination)
    assert problems(evidence) == []
    assert differing(before, after, evidence.may_be_bad) == []
    assert {gpa for gpa, content in after.items() if content is None} == evidence.may_be_bad


@pytest.mark.parametrize("accel", ["kvm", "process"], indirect=True)
@pytest.mark.parametrize("page_size", [PAGE_4K, PAGE_2M], ids=["to-4K", "to-2M"])
async def test_four_kib_of_a_huge_page_that_an_operator_names(pair: Pair, vm, accel, page_size, huge_pages):
    """To small pages exactly these arrive as bad; to huge ones the page around them."""
    players = await cast(pair, vm, accel, made_of(("memfd", PAGE_2M)), WaitingShape("memfd", page_size))
    course = Course(players)
    huge = (await pages_of(course))[5]
    gpa = huge + 77 * PAGE_4K
    error = await pair.home_api.report_error(vm, gpa, 12)
    assert (error.gpa, error.lsb, error.origin) == (gpa, 12, common_pb2.ERROR_ORIGIN_OPERATOR)
    course.bad_before = frozenset({gpa})
    moved = await course.move(vm, pair.away.place.peer)
    evidence = await course.judge(SOON_S)
    lsb = page_size.bit_length() - 1
    assert problems(evidence) == []
    assert moved.progress.poison == 1
    assert {(check.gpa, check.lsb) for check in evidence.at_end.machine_checks} == {(gpa >> lsb << lsb, lsb)}
    bad = {at for at, content in (await read_memory(players.destination)).items() if content is None}
    assert bad == (frozenset({gpa}) if page_size == PAGE_4K else evidence.may_be_bad)


async def test_pages_that_do_not_fit_the_sources_regions(pair: Pair, vm):
    """Refused before the VM stops: 50 MiB and a bit are no huge pages."""
    players = await cast(pair, vm, "process", shape(51 * MIB, backing="memfd"), WaitingShape(page_size=PAGE_2M))
    await pair.home_api.create(vm, vm, pair.away.place.peer)
    last = await ended(pair.home_api, vm)
    assert (last.phase, last.reason_code) == (migrations_pb2.PHASE_FAILED, "LAYOUT_MISMATCH")
    assert "layout.regions[0].size: 0x3300000 is not a positive multiple" in last.reason
    assert last.downtime_s == 0
    await goes_on(players.source)


@pytest.fixture
def transparent_huge_pages() -> None:
    """A kernel that has them."""
    if not THP.exists():
        pytest.skip(f"this kernel has no {THP}")


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
@pytest.mark.usefixtures("transparent_huge_pages")
async def test_transparent_huge_pages_come_after_the_last_page(pair: Pair, vm, backing):
    """Where a page is bad its 2 MiB stay small, and it stays bad."""
    source = await pair.stage.guest(vm, pair.home, "process", made_of((backing, PAGE_4K), workload="idle"))
    destination = await pair.stage.guest(vm, pair.away, "process", None, ("--thp",))
    await pair.stage.warm(source)
    course = Course(Cast(source, destination, pair.home_api, pair.away_api), idle=True)
    bad = (await pages_of(course))[1000]
    await course.poison_before(told([bad], True))
    await course.move(vm, pair.away.place.peer)
    assert problems(await course.judge(SOON_S)) == []
    (region,) = await destination.admin.regions()

    small = {bad // PAGE_2M} | set(range(PAYLOAD_BYTES // PAGE_2M))  # much of the payload's memory is no page at all

    async def collapsed() -> bool:
        huge = await asyncio.to_thread(huge_pages_of, destination.process.pid, region)
        return huge | small == set(range(MEMORY // PAGE_2M)) and bad // PAGE_2M not in huge

    await until("transparent huge pages everywhere but around the bad page", collapsed, SOON_S)
    assert [gpa for gpa, content in (await read_memory(destination)).items() if content is None] == [bad]


def huge_pages_of(pid: int, region: Mapped) -> set[int]:
    """Which 2 MiB of a region are a transparent huge page (PAGE_IS_HUGE of PAGEMAP_SCAN, Linux 6.7)."""
    found = (ctypes.c_uint64 * 3 * (MEMORY // PAGE_4K))()
    argument = struct.pack(
        "=12Q",
        *(96, 0, region.hva, region.hva + region.size, 0, ctypes.addressof(found), len(found), 0),
        *(0, PAGE_IS_HUGE, 0, PAGE_IS_HUGE),
    )
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        count = fcntl.ioctl(pagemap, PAGEMAP_SCAN, bytearray(argument))
    ranges = [(start - region.hva, end - region.hva) for start, end, _ in found[:count]]
    return {page for start, end in ranges for page in range(start // PAGE_2M, end // PAGE_2M)}
