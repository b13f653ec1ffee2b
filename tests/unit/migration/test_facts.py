"""Both hosts tell the same: a pager that dies, events of both, deletion, and the end of history."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
import structlog

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.migration.environment import History
from vmferry.migration.service import MigrationService
from vmferry.model.facts import Direction, Event, Live, MoveFacts, merged, outgoing, spans
from vmferry.model.migration import Job, PageProgress, Phase, PhaseChange, course_with
from vmferry.model.pace import Pace
from vmferry.model.pager import LinkChanged
from vmferry.model.problems import problems
from vmferry.testing.host import Pair


def on_b(pair: Pair) -> MigrationService:
    assert pair.b.service is not None
    return pair.b.service


async def until(pair: Pair, check: Callable[[MoveFacts, MoveFacts], bool]) -> tuple[MoveFacts, MoveFacts]:
    """The facts of both hosts once they pass the check."""
    async with asyncio.timeout(patient(30)):
        while True:
            here = await pair.service.moves.facts("m1")
            there = await on_b(pair).moves.facts("m1", Direction.IN)
            if check(here, there):
                return here, there
            await asyncio.sleep(0.02)


async def in_postcopy(pair: Pair) -> None:
    pair.b.pagers.arrives = False
    await pair.service.create("m1", "web", "b", 0, "10.0.0.7")
    await pair.a.job_where("m1", phases=frozenset({"POSTCOPY"}))


async def test_a_killed_source_pager_is_told_alike_on_both_hosts(pair: Pair) -> None:
    await in_postcopy(pair)
    with structlog.testing.capture_logs() as logs:
        pair.a.pagers.running["m1-source"].end()
        dead = pair.b.pagers.running["m1-destination"]
        dead.state = replace(dead.state, link_up=False, link_reason="reset by peer")
        dead.emit(LinkChanged(up=False, reason="reset by peer"))
        cause = "the source's pager (a, pid 1) was killed by SIGKILL"
        here, there = await until(pair, lambda one, other: one.reason == other.reason == cause)
    for facts in (here, there):
        assert (facts.phase, facts.reason_code) == (Phase.POSTCOPY_PAUSED, "PAGER_FAILED")
        assert (facts.source_host, facts.destination_host, facts.requested_by) == ("a", "b", "10.0.0.7")
        (problem,) = problems("x", [facts], (), 0, facts.updated_us)
        assert (problem.host, problem.cause) == ("a", cause)
    assert {"error"} == {one["log_level"] for one in logs if one.get("phase") == "POSTCOPY_PAUSED"}
    assert {one["event"] for one in logs if one["log_level"] == "error"} >= {"migration.state", "incoming.state"}


async def test_both_hosts_have_the_events_of_both(pair: Pair) -> None:
    await in_postcopy(pair)
    kinds = {"created", "PREPARING", "SWITCHOVER", "POSTCOPY"}
    here, there = await until(
        pair,
        lambda one, other: (
            {("a", kind) for kind in kinds} | {("b", "POSTCOPY")}
            <= {(event.host, event.kind) for event in one.events} & {(event.host, event.kind) for event in other.events}
        ),
    )
    assert [event for event in here.events if event in there.events]
    pair.b.pagers.running["m1-destination"].all_arrive()
    await pair.a.job_where("m1")
    ended, _ = await until(pair, lambda one, other: one.ended and other.ended)
    assert [span.phase for span in ended.spans][-2:] == [Phase.POSTCOPY, Phase.COMPLETED]
    assert any("to start the VM" in part.name for part in ended.blackout)


async def test_the_destination_lists_its_incoming_migrations(pair: Pair) -> None:
    await in_postcopy(pair)
    (facts,) = on_b(pair).moves.incoming()
    assert (facts.direction, facts.vm, facts.phase) == (Direction.IN, "web", Phase.POSTCOPY)
    assert (await on_b(pair).moves.moving())[0].migration == "m1"


async def test_an_active_migration_is_not_deleted_and_an_ended_one_is(pair: Pair) -> None:
    await in_postcopy(pair)
    for service in (pair.service, on_b(pair)):
        with pytest.raises(VmferryError) as caught:
            await service.moves.delete("m1")
        assert caught.value.reason is Reason.MIGRATION_RUNNING
    pair.b.pagers.running["m1-destination"].all_arrive()
    await pair.a.job_where("m1")
    await until(pair, lambda one, other: one.ended and other.ended)
    for host in (pair.a, pair.b):
        host.script.observe = lambda: None  # The pair proves its invariants by the journal, which ends here.
    before = await pair.service.moves.totals()
    for service in (pair.service, on_b(pair)):
        await service.moves.delete("m1")
        with pytest.raises(VmferryError) as caught:
            await service.moves.facts("m1")
        assert caught.value.reason is Reason.MIGRATION_UNKNOWN
    assert await pair.a.store.jobs() == []
    assert await pair.a.store.journal("m1") == []
    after = await pair.service.moves.totals()
    assert after == before
    assert after.out == {"COMPLETED ": 1}


async def test_history_ends_by_number_and_by_age(pair: Pair) -> None:
    for name in ("m1", "m2", "m3"):
        await pair.service.create(name, "web", "nowhere")
        await pair.a.job_where(name)
        pair.network.clock.advance(10)
    await pair.service.moves.prune_once(History(keep_s=1e6, keep_most=2))
    assert [job.migration for job in await pair.service.jobs()] == ["m2", "m3"]
    await pair.service.moves.prune_once(History(keep_s=15.0, keep_most=2))
    assert [job.migration for job in await pair.service.jobs()] == ["m3"]
    await pair.a.stop()
    await pair.a.start()
    assert [job.migration for job in await pair.service.jobs()] == ["m3"]
    assert (await pair.service.moves.totals()).out == {"FAILED DESTINATION_UNREACHABLE": 3}


def test_the_pace_is_that_of_three_seconds_and_falls_to_zero() -> None:
    pace = Pace()
    progress = PageProgress(total=100, absent=100)
    for second in range(5):
        progress = replace(progress, absent=100 - 10 * second, bytes_received=1000 * second)
        shown = pace.observe(progress, float(second), second * 1_000_000)
    assert (shown.rate_bytes_per_s, shown.remaining_s, shown.last_page_us) == (1000.0, 6.0, 4_000_000)
    for second in range(5, 9):
        shown = pace.observe(progress, float(second), second * 1_000_000)
    assert (shown.rate_bytes_per_s, shown.remaining_s, shown.last_page_us) == (0.0, 0.0, 4_000_000)


def test_the_oldest_wait_has_one_begin() -> None:
    pace = Pace()
    waits = PageProgress(total=9, absent=9, waiting_faults=1, oldest_wait_us=1_000_000)
    begins = {
        pace.observe(replace(waits, oldest_wait_us=1_000_000 + 200_000 * n + n), 0.2 * n, 9_000_000 + 200_000 * n)
        for n in range(4)
    }
    assert {one.oldest_fault_since_us for one in begins} == {8_000_000}
    assert pace.observe(replace(waits, waiting_faults=0), 1.0, 10_000_000).oldest_fault_since_us == 0


def test_events_of_a_host_keep_their_order_although_its_clock_was_set_back() -> None:
    ours = [Event("a", 1, 100, "x"), Event("a", 2, 50, "y")]
    theirs = [Event("b", 9, 70, "z"), Event("b", 9, 70, "z")]
    assert [event.kind for event in merged(ours, theirs)] == ["z", "x", "y"]


def test_a_course_has_a_span_for_each_phase() -> None:
    course = course_with(course_with((), Phase.QUEUED, 1_000_000), Phase.PREPARING, 3_000_000)
    assert course_with(course, Phase.PREPARING, 4_000_000) is course
    assert [(span.phase, span.duration_s) for span in spans(course, 4_500_000)] == [
        (Phase.QUEUED, 2.0),
        (Phase.PREPARING, 1.5),
    ]
    long = course
    for number in range(200):
        long = course_with(long, (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED)[number % 2], 5_000_000 + number)
    assert (len(long), long[0]) == (64, PhaseChange(Phase.QUEUED, 1_000_000))


def test_an_ended_migration_has_no_pace() -> None:
    progress = PageProgress(total=9, waiting_faults=1, rate_bytes_per_s=5.0, remaining_s=3.0)
    facts = outgoing("a", Job("m1", "web", "b", phase=Phase.COMPLETED, progress=progress), Live(), 9)
    assert (facts.progress.waiting_faults, facts.progress.rate_bytes_per_s) == (0, 0.0)
