"""The verdict can fail in each of its ways: one piece of good evidence, broken one piece at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmferry.demo.admin import GuestReport, MachineCheck, Mapped, report_of
from vmferry.demo.course import largest_page, lost_with, pages_to_lose
from vmferry.demo.verdict import Evidence, LedgerPage, healed, problems
from vmferry.v1.common_pb2 import MemoryLayout, MemoryRegion

A, B, C, D, CLEAN = 0x1000000, 0x1001000, 0x1002000, 0x1003000, 0x2000000

AT_SOURCE = GuestReport(state="stopped", touches=1000, machine_checks=(MachineCheck(A, "AR", 0),), passes=3)
AT_END = GuestReport(
    state="running",
    touches=3000,
    machine_checks=(MachineCheck(A, "AR", 0), MachineCheck(B, "AO", 1), MachineCheck(C, "AR", 1)),
    passes=7,
)
GOOD = Evidence(
    phase="COMPLETED",
    reason="",
    poisoned_before=frozenset({A, B}),
    poisoned_during=frozenset({C, D}),
    at_source=AT_SOURCE,
    at_arrival=replace(AT_END, touches=2000, passes=5),
    at_end=AT_END,
    ledger=(LedgerPage(A, True), LedgerPage(B, True), LedgerPage(C, True)),
    poison_pages=3,
    pages_total=5000,
    pages_arrived=5000,
    source_running=False,
)


def end(**changes) -> Evidence:
    return replace(GOOD, at_end=replace(AT_END, **changes))


def checks(*pages: int) -> tuple[MachineCheck, ...]:
    return tuple(MachineCheck(page, "AR", 0) for page in pages)


def test_good_evidence_has_no_problem():
    assert problems(GOOD) == []


def test_a_page_whose_good_copy_had_arrived_is_healed():
    assert healed(GOOD) == {D}


def test_an_idle_guest_need_not_touch():
    still = replace(GOOD, at_arrival=AT_END, idle=True)
    assert problems(still) == []
    assert any("does not go on" in problem for problem in problems(replace(still, idle=False)))


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        pytest.param(
            replace(GOOD, phase="FAILED", reason="VMM_GONE x"), "FAILED, not COMPLETED: VMM_GONE x", id="failed"
        ),
        pytest.param(replace(GOOD, source_running=True), "source VM still runs", id="two copies"),
        pytest.param(replace(GOOD, pages_arrived=4999), "4999 of 5000 pages", id="pages lacking"),
        pytest.param(replace(GOOD, pages_total=0, pages_arrived=0), "0 of 0 pages", id="nothing moved"),
        pytest.param(replace(GOOD, at_source=replace(AT_SOURCE, touches=9999)), "another guest", id="another guest"),
        pytest.param(end(touches=2000), "does not go on", id="guest stands still"),
        pytest.param(end(state="stopped"), "stopped, not running", id="guest stopped"),
        pytest.param(end(wrong_bytes=3, wrong_pages=(CLEAN,)), "3 wrong bytes, first in 0x2000000", id="corruption"),
        pytest.param(end(fatal="exception 14"), "the guest died: exception 14", id="guest died"),
        pytest.param(end(machine_checks=checks(A, C)), "no machine check at 0x1001000", id="poison lost"),
        pytest.param(end(machine_checks=checks(A, B, B, C)), "2 machine checks at 0x1001000", id="told twice"),
        pytest.param(end(machine_checks=checks(A, B, C, CLEAN)), "0x2000000, which is not poisoned", id="clean page"),
        pytest.param(
            end(machine_checks=checks(A, B + 8, C)), "a machine check at 0x1001008", id="address within the page"
        ),
        pytest.param(
            replace(GOOD, ledger=(*GOOD.ledger, LedgerPage(CLEAN, False))), "ledger has 0x2000000", id="ledger invents"
        ),
        pytest.param(replace(GOOD, ledger=GOOD.ledger[1:]), "ledger lacks 0x1000000", id="ledger forgets"),
        pytest.param(
            replace(GOOD, ledger=(*GOOD.ledger, LedgerPage(D, True))), "told of 0x1003000; it was not", id="ledger lies"
        ),
        pytest.param(replace(GOOD, poison_pages=2), "2 pages came as poison, the guest was told of 3", id="counts"),
    ],
)
def test_each_way_to_fail_is_found(evidence, words):
    found = problems(evidence)
    assert any(words in problem for problem in found), found


HUGE = 0x1200000


def small_pages(gpa: int, count: int = 512) -> frozenset[int]:
    return frozenset(range(gpa, gpa + count * 4096, 4096))


def test_a_huge_page_is_told_by_one_machine_check():
    """Two vCPUs that stumble over it at once are both told."""
    told = tuple(MachineCheck(HUGE, "AR", vcpu, 21) for vcpu in (0, 1))
    good = replace(
        end(machine_checks=told),
        poisoned_before=small_pages(HUGE),
        poisoned_during=frozenset(),
        ledger=(LedgerPage(HUGE, True, 21),),
        poison_pages=1,
        destination_page=2 << 20,
    )
    assert problems(good) == []
    assert any(
        "1 pages came as poison, the guest was told of 512" in one
        for one in problems(replace(good, destination_page=4096))
    )
    twice = replace(good, at_end=replace(good.at_end, machine_checks=(*told, told[0])))
    assert any("2 machine checks at 0x1200000" in problem for problem in problems(twice))
    smaller = replace(good, poisoned_before=small_pages(HUGE, 1))
    assert problems(smaller) == [], "a huge page of the destination goes bad with any part of it"
    assert any(
        "which is not poisoned" in one for one in problems(replace(smaller, destination_page=4096, poison_pages=512))
    )


def test_every_part_of_a_huge_page_is_told_on_a_host_of_small_ones():
    parts = sorted(small_pages(HUGE))
    good = replace(
        end(machine_checks=tuple(MachineCheck(gpa, "AO", 0) for gpa in parts)),
        poisoned_before=small_pages(HUGE),
        poisoned_during=frozenset(),
        ledger=tuple(LedgerPage(gpa, True) for gpa in parts),
        poison_pages=512,
    )
    assert problems(good) == []
    lacking = replace(
        good, at_end=replace(good.at_end, machine_checks=good.at_end.machine_checks[1:]), poison_pages=511
    )
    assert any("no machine check at 0x1200000," in problem for problem in problems(lacking))


def test_a_bad_page_takes_the_page_of_its_backing_along():
    regions = [Mapped(0, 0x7000_0000, 0x1000000, 4096), Mapped(0x1000000, 0x7100_0000, 0x1000000, 2 << 20)]
    assert lost_with([(0x5000, True), (HUGE + 0x3000, False), (HUGE, True)], regions) == {0x5000} | small_pages(HUGE)


def test_pages_to_lose_hold_nothing_of_the_payload():
    def layout(size: int, page_size: int) -> MemoryLayout:
        return MemoryLayout(regions=[MemoryRegion(gpa=0, size=size, page_size=page_size)])

    assert pages_to_lose(layout(20 << 20, 2 << 20)) == [16 << 20, 18 << 20]
    assert pages_to_lose(layout(2 << 30, 1 << 30)) == [1 << 30]
    assert len(pages_to_lose(layout(17 << 20, 4096))) == 256
    assert largest_page(layout(2 << 30, 1 << 30)) == 1 << 30


def test_a_report_that_lacks_a_field_is_an_error_not_a_zero():
    with pytest.raises(KeyError, match="wrong_bytes"):
        report_of({"state": "running", "touches": 1, "writes": 1})
