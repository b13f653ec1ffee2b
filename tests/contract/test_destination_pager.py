"""A destination's pager, driven by a plain gRPC client, fed by a plain source, for a VMM in a child process."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.support.contract.destination_rig import Destination, gpa_of
from tests.support.contract.lanes import MOST_DATA_PAGES, Frame
from tests.support.contract.page_source import FIRST_PAGES, PAGES, Poison, expected
from tests.support.contract.vmm_child import PAGE, PATIENCE_S, Json
from vmferry.v1 import common_pb2, pager_pb2

BAD = 5
OTHER_REGION = FIRST_PAGES[1] + 2
ZERO = 3
GIVEN_BACK = 20
READ = Poison(common_pb2.ERROR_ORIGIN_READ, hop=1)
KNOWN = Poison(common_pb2.ERROR_ORIGIN_VMM, guest_visible=True, hop=1)


def report(destination: Destination, page: int, severity: str, thread: int) -> Json:
    """The frame for a page that is READ."""
    return {
        "type": "memory_error",
        "gpa": gpa_of(page),
        "hva": destination.vmm.hva + page * PAGE,
        "lsb": 12,
        "severity": severity,
        "thread": thread,
        "origin": "read",
        "hop": 1,
    }


async def test_a_touch_gives_the_contents_of_the_source(destination: Destination) -> None:
    await destination.attach()
    await destination.connect()
    for page in (0, ZERO, PAGES - 1, OTHER_REGION):
        assert await destination.vmm.touch(page) == expected(page)
    progress = (await destination.status()).progress
    assert (progress.faults, progress.push, progress.poison) == (4, 0, 0)
    assert progress.total == PAGES
    assert progress.demand + progress.zero + progress.absent == PAGES
    assert progress.first_touch.count == 4


async def test_a_touch_of_poison_is_reported_before_the_sigbus(destination: Destination) -> None:
    destination.source.poison = {BAD: READ, OTHER_REGION: READ}
    await destination.attach()
    await destination.connect()
    for number, page in enumerate((BAD, OTHER_REGION), 1):
        act, thread = await destination.vmm.start_touch(page)
        assert await destination.vmm.touched(act) == "sigbus"
        frame = report(destination, page, "AR", thread)
        assert destination.vmm.frames[number - 1 :] == [frame]
        said = destination.vmm.said
        last_frame = max(index for index, line in enumerate(said) if line.startswith("frame "))
        assert last_frame < said.index(f"touched {act} sigbus")
        assert await destination.vmm.touch(page) == "sigbus", "again: the page is reported once"
    events = await destination.events_until(lambda event: event.memory_error.error.gpa == gpa_of(OTHER_REGION))
    errors = [event.memory_error for event in events if event.WhichOneof("event") == "memory_error"]
    assert [error.error.gpa for error in errors] == [gpa_of(BAD), gpa_of(OTHER_REGION)]
    assert errors[0].error.severity == common_pb2.SEVERITY_ACTION_REQUIRED
    assert errors[0].error.origin == common_pb2.ERROR_ORIGIN_READ
    assert errors[0].error.guest_visible
    assert errors[0].hva == destination.vmm.hva + BAD * PAGE
    assert all(error.reported and error.thread_id for error in errors)
    assert (await destination.status()).progress.machine_checks == 2


async def test_poison_found_by_push_is_reported_with_nobody_waiting(destination: Destination) -> None:
    destination.source.poison = {BAD: READ}
    await destination.everything()
    assert await destination.vmm.touch(BAD) == "sigbus"
    assert destination.vmm.frames == [report(destination, BAD, "AO", 0)]
    event = (await destination.event("memory_error")).memory_error
    assert event.error.severity == common_pb2.SEVERITY_ACTION_OPTIONAL
    assert (event.thread_id, event.reported) == (0, True)
    assert BAD not in destination.source.asked


async def test_poison_that_the_guest_knows_is_not_reported(destination: Destination) -> None:
    destination.source.poison = {BAD: KNOWN, OTHER_REGION: KNOWN}
    await destination.attach()
    await destination.connect()
    assert await destination.vmm.touch(BAD) == "sigbus"
    await destination.push()
    await destination.event("all_present")
    assert await destination.vmm.touch(OTHER_REGION) == "sigbus"
    assert destination.vmm.frames == []
    progress = (await destination.status()).progress
    assert (progress.poison, progress.machine_checks) == (2, 0)


async def test_two_threads_on_one_page_ask_once(destination: Destination) -> None:
    await destination.attach()
    await destination.connect()
    destination.source.may_answer.clear()
    acts = [(await destination.vmm.start_touch(1))[0] for _ in range(2)]
    await destination.status_until(lambda status: status.progress.duplicate_faults == 1)
    destination.source.may_answer.set()
    assert [await destination.vmm.touched(act) for act in acts] == [expected(1)] * 2
    assert destination.source.asked.count(1) == 1


@pytest.mark.parametrize("piece_bytes", [0, Frame.FORM.size, Frame.FORM.size + PAGE, PAGE, PAGE + 7, 1000])
async def test_answers_that_come_in_one_are_taken_apart(destination: Destination, piece_bytes: int) -> None:
    """Short ones and long ones, in any order and cut anywhere: each page gets what is its own."""
    pages = [ZERO, 1, BAD, OTHER_REGION, ZERO + 4, 8]
    destination.source.poison = {BAD: READ}
    destination.source.together, destination.source.piece_bytes = len(pages), piece_bytes
    await destination.attach()
    await destination.connect()
    acts = [(await destination.vmm.start_touch(page))[0] for page in pages]
    assert [await destination.vmm.touched(act) for act in acts] == [
        "sigbus" if page == BAD else expected(page) for page in pages
    ]


async def test_two_threads_on_a_poisoned_page_are_told_once(destination: Destination) -> None:
    destination.source.poison = {BAD: READ}
    await destination.attach()
    await destination.connect()
    destination.source.may_answer.clear()
    acts = [(await destination.vmm.start_touch(BAD))[0] for _ in range(2)]
    await destination.status_until(lambda status: status.progress.duplicate_faults == 1)
    destination.source.may_answer.set()
    assert [await destination.vmm.touched(act) for act in acts] == ["sigbus"] * 2
    assert [frame["severity"] for frame in destination.vmm.frames] == ["AR"]


@pytest.mark.parametrize("lanes", [0, 3])
async def test_push_fills_all_and_the_migration_completes(destination: Destination, lanes: int) -> None:
    destination.source.poison = {BAD: READ}
    await destination.attach()
    with pytest.raises(grpc.aio.AioRpcError) as early:
        await destination.push()
    assert early.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await destination.connect()
    with pytest.raises(grpc.aio.AioRpcError) as unfinished:
        await destination.complete()
    assert unfinished.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await destination.push(lanes)
    await destination.event("all_present")
    status = await destination.status()
    assert (status.all_present, status.progress.absent) == (True, 0)
    assert status.progress.push + status.progress.zero + status.progress.poison == PAGES
    assert (status.progress.zero, status.progress.poison) == (PAGES // 4, 1)
    assert await destination.complete() == 1
    for page in range(PAGES):
        assert await destination.vmm.touch(page) == ("sigbus" if page == BAD else expected(page))
    assert destination.source.asked == []


async def test_a_poisoned_page_stays_so_after_the_end(destination: Destination) -> None:
    """A dropped marker in a range that is not registered would read as zeros."""
    destination.source.poison = {BAD: READ, OTHER_REGION: KNOWN}
    await destination.everything()
    assert await destination.complete() == 2
    await destination.source.stop()
    for page in (BAD, OTHER_REGION):
        for _ in range(2):
            await destination.vmm.advise(page, "dontneed")
            assert await destination.vmm.touch(page) == "sigbus"
    assert destination.vmm.frames == [report(destination, BAD, "AO", 0)]


async def test_a_page_given_back_reads_as_zeros_without_the_source(destination: Destination) -> None:
    await destination.attach()
    await destination.connect()
    assert await destination.vmm.touch(0) == expected(0)
    asked = list(destination.source.asked)
    for page in (0, 20):  # one that had arrived, one that had not
        await destination.vmm.give_back(page)
        assert await destination.vmm.touch(page) == "byte:0"
    assert destination.source.asked == asked
    await destination.push()
    await destination.event("all_present")
    assert [await destination.vmm.touch(page) for page in (0, 20, 1)] == ["byte:0", "byte:0", expected(1)]


async def test_pages_marked_by_the_daemon_are_poison_from_then_on(destination: Destination) -> None:
    await destination.attach()
    await destination.connect()
    assert await destination.mark(BAD) == (1, 0, 0)
    assert await destination.mark(BAD) == (0, 1, 0)
    assert await destination.mark(OTHER_REGION, guest_visible=True) == (1, 0, 0)
    assert [await destination.vmm.touch(page) for page in (BAD, OTHER_REGION)] == ["sigbus", "sigbus"]
    assert destination.vmm.frames == [report(destination, BAD, "AO", 0) | {"origin": "operator", "hop": 0}]
    assert await destination.vmm.touch(1) == expected(1)
    assert await destination.mark(1) == (0, 0, 1), "a good copy that no guest has seen bad is healed"
    assert await destination.vmm.touch(1) == expected(1)
    assert not {BAD, OTHER_REGION} & set(destination.source.asked)


@pytest.mark.parametrize("ended", [False, True], ids=["on the way", "after the end"])
async def test_a_page_that_went_bad_here_stays_so(destination: Destination, ended: bool) -> None:
    """The VMM was told, or told of it itself: a balloon may not make a good page of it, wherever the ranges stand."""
    await destination.everything()
    if ended:
        assert await destination.complete() == 0
    assert await destination.mark(1, guest_visible=True) == (1, 0, 0)
    assert await destination.mark(1, guest_visible=True) == (0, 1, 0)
    await destination.vmm.advise(1, "dontneed")
    assert await destination.vmm.touch(1) == "sigbus"
    await destination.vmm.give_back(1)
    assert await destination.vmm.touch(1) == "sigbus"
    assert await destination.vmm.touch(2) == expected(2)
    assert destination.vmm.frames == []
    assert await destination.complete() == 1


async def test_the_longest_frame_changes_only_its_wanted_pages(destination: Destination) -> None:
    """A whole region in one DATA, after some of its pages came otherwise, went bad or were given back."""
    source, vmm = destination.source, destination.vmm
    source.zeros_as_data, source.push_pages = True, MOST_DATA_PAGES
    source.may_push.clear()
    assert FIRST_PAGES[1] == MOST_DATA_PAGES
    await destination.attach()
    await destination.connect()
    await destination.push(1)
    await asyncio.wait_for(source.pushing.wait(), PATIENCE_S)
    assert await destination.mark(BAD, guest_visible=True) == (1, 0, 0)
    assert await vmm.touch(GIVEN_BACK) == expected(GIVEN_BACK)
    for page in (GIVEN_BACK, GIVEN_BACK + 1):  # one that had arrived, one that had not
        await vmm.give_back(page)
        assert await vmm.touch(page) == "byte:0"
    assert await vmm.touch(ZERO) == expected(ZERO)
    source.may_push.set()
    await destination.event("all_present")
    assert await destination.complete() == 1
    other = {BAD: "sigbus", GIVEN_BACK: "byte:0", GIVEN_BACK + 1: "byte:0"}
    for page in range(PAGES):
        assert await vmm.touch(page) == other.get(page, expected(page)), page
    assert vmm.frames == []


@pytest.mark.parametrize("lanes", [1, 4])
async def test_push_and_touches_at_once(destination: Destination, lanes: int) -> None:
    """Whichever way a page comes first: its content is right, and poison is reported once."""
    bad = set(range(2, PAGES, 7))
    destination.source.poison = dict.fromkeys(bad, READ)
    await destination.attach()
    await destination.connect()
    destination.source.may_push.clear()
    await destination.push(lanes)
    acts = {page: (await destination.vmm.start_touch(page))[0] for page in range(0, PAGES, 3)}
    destination.source.may_push.set()
    acts |= {page: (await destination.vmm.start_touch(page))[0] for page in range(PAGES) if page not in acts}
    for page, act in acts.items():
        assert await destination.vmm.touched(act) == ("sigbus" if page in bad else expected(page)), page
    await destination.event("all_present")
    assert sorted(frame["gpa"] for frame in destination.vmm.frames) == [gpa_of(page) for page in sorted(bad)]
    for frame in destination.vmm.frames:
        assert (frame["severity"] == "AR") == (frame["thread"] != 0)
    progress = (await destination.status()).progress
    assert progress.absent == 0
    assert progress.demand + progress.push + progress.zero + progress.poison == PAGES
    assert (progress.poison, progress.machine_checks) == (len(bad), len(bad))
    assert len(destination.source.asked) == len(set(destination.source.asked)), "each page was asked once"


async def test_a_pager_that_guards_poison_ends_only_by_force(anonymous: Destination) -> None:
    anonymous.source.poison = {BAD: READ}
    shutdown = anonymous.control.Shutdown
    await anonymous.attach()
    await anonymous.connect()
    with pytest.raises(grpc.aio.AioRpcError) as absent:
        await shutdown(pager_pb2.ShutdownRequest(), timeout=PATIENCE_S)
    await anonymous.push()
    await anonymous.event("all_present")
    assert await anonymous.complete() == 1
    with pytest.raises(grpc.aio.AioRpcError) as guarded:
        await shutdown(pager_pb2.ShutdownRequest(), timeout=PATIENCE_S)
    assert {absent.value.code(), guarded.value.code()} == {grpc.StatusCode.FAILED_PRECONDITION}
    await shutdown(pager_pb2.ShutdownRequest(even_if_guest_dies=True), timeout=PATIENCE_S)
    assert await asyncio.to_thread(anonymous.pager.wait, PATIENCE_S) == 0


async def test_a_pager_that_guards_poison_ends_with_its_vmm(anonymous: Destination) -> None:
    """No daemon asks it to: the daemon may have ended before the VMM."""
    anonymous.source.poison = {BAD: READ}
    await anonymous.everything()
    assert await anonymous.complete() == 1
    await anonymous.vmm.end()
    assert await asyncio.to_thread(anonymous.pager.wait, PATIENCE_S) == 0


async def test_a_pager_with_nothing_to_guard_ends_when_asked(anonymous: Destination) -> None:
    await anonymous.everything()
    assert await anonymous.complete() == 0
    await anonymous.control.Shutdown(pager_pb2.ShutdownRequest(), timeout=PATIENCE_S)
    assert await asyncio.to_thread(anonymous.pager.wait, PATIENCE_S) == 0
    assert await anonymous.vmm.touch(0) == expected(0)


async def test_events_are_numbered_and_kept_until_acknowledged(anonymous: Destination) -> None:
    anonymous.source.poison = {BAD: READ, OTHER_REGION: READ}
    await anonymous.everything()
    newest = (await anonymous.status()).newest_event

    async def numbers(after: int) -> list[int]:
        events = await anonymous.events_until(lambda event: event.number == newest, after)
        return [event.number for event in events]

    assert await numbers(0) == list(range(1, newest + 1))
    assert await numbers(0) == list(range(1, newest + 1)), "again: nothing was acknowledged"
    assert await numbers(newest - 1) == [newest]
    await anonymous.control.AcknowledgeEvents(pager_pb2.AcknowledgeEventsRequest(up_to=2), timeout=PATIENCE_S)
    assert await numbers(0) == list(range(3, newest + 1))
    assert await anonymous.mark(0, guest_visible=True) == (1, 0, 0)
    watched = anonymous.control.WatchEvents(pager_pb2.WatchEventsRequest(after=newest), timeout=PATIENCE_S)
    await anonymous.vmm.end()
    async for event in watched:
        newest += 1
        assert event.number == newest
        if event.WhichOneof("event") == "memory_detached":
            break
    assert not (await anonymous.status()).memory_attached
