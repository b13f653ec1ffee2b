"""Goals: reached, missed, not measured; never one for the other."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from rounds import GUEST, IDLE, a_round
from vmferry_bench.goals import Goal, Judge, summary
from vmferry_bench.plan import ROUNDS, shapes, turns
from vmferry_bench.shape import OURS, PLAIN, PREEMPT, SIDES, Alone, Round, round_of

ALONE = Alone(
    floor_us={"p50": 90.0},
    idle_us={"p50": 99.0},
    poison_us={"p50": 80.0},
    data_us={"p50": 100.0},
    rates={"1": [100.0], "4": [99.0] * 4, "16": [70.0, *[80.0] * 14, 160.0]},
)


def judged(rounds: list[Round], alone: Alone = ALONE) -> dict[str, Goal]:
    return {goal.measure: goal for goal in Judge(rounds, GUEST, IDLE, alone).goals()}


def both(**ours: object) -> list[Round]:
    """Rounds in the order in which they are run."""
    sides = [OURS, PREEMPT, OURS, PLAIN] * 3
    return [a_round(side, number=n, **(ours if side == OURS else {})) for n, side in enumerate(sides)]  # type: ignore[arg-type]


def test_a_ratio_that_is_small_enough_is_met() -> None:
    goal = judged(both(wait_us=250.0))["first touch → resumed, p50, to QEMU"]
    assert goal.value == pytest.approx(0.25)
    assert goal.met is True
    assert (goal.low, goal.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_a_ratio_that_is_too_large_is_not() -> None:
    goals = judged(both(wait_us=500.0))
    assert goals["first touch → resumed, p50, to QEMU"].met is False
    assert goals["first touch → resumed, p99, µs"].met is False
    assert goals["guest blocked time, to QEMU"].met is False


def test_throughput_must_be_at_least_its_goal() -> None:
    goals = judged(both(postcopy_s=0.25))
    assert goals["throughput to the last page, guest random, to QEMU"].met is True
    goals = judged(both(postcopy_s=0.26))
    assert goals["throughput to the last page, guest random, to QEMU"].met is False


def test_what_is_not_measured_is_neither_met_nor_missed() -> None:
    goals = judged([a_round(OURS)], Alone())
    missing = {measure for measure, goal in goals.items() if goal.value is None}
    assert "throughput to the last page, guest idle, to QEMU" in missing
    assert "first touch → resumed, p50, to QEMU" in missing
    assert "poisoned page / data page, answer, p50" in missing
    assert all(goals[measure].met is None for measure in missing)
    assert goals["first touch → resumed, p50, µs"].met is False


def test_void_rounds_do_not_count() -> None:
    rounds = [*both(wait_us=250.0), a_round(OURS, wait_us=9e6, faults="a page was lost")]
    assert judged(rounds)["worst first touch, ms"].value == pytest.approx(0.25)


def test_what_is_measured_of_ours_alone() -> None:
    goals = judged(both())
    assert goals["first touch, nothing else on the link, p50, to uffd over TCP"].value == pytest.approx(1.1)
    assert goals["poisoned page / data page, answer, p50"].met is True
    assert goals["faults/s a VM, 1 → 16 VMs, fall"].value == pytest.approx(0.2)
    assert goals["faults/s of 16 VMs, most to least"].met is False


def test_the_page_table_is_the_middle_of_what_was_seen() -> None:
    assert judged(both(table_bytes_per_page=1.0))["page table, bytes a page"].met is True
    assert judged(both())["page table, bytes a page"].met is None


def test_goals_and_rounds_are_json_and_rounds_come_back() -> None:
    rounds = both()
    goals = Judge(rounds, GUEST, IDLE, Alone()).goals()
    text = json.dumps(
        {"goals": [asdict(goal) for goal in goals], "rounds": [one.plain() for one in rounds]}, allow_nan=False
    )
    assert [round_of(plain) for plain in json.loads(text)["rounds"]] == rounds
    assert json.loads(text)["goals"][0].keys() >= {"measure", "goal", "value", "met"}


def test_the_summary_has_a_row_for_each_guest_and_side() -> None:
    rows = summary([*both(), a_round(OURS, IDLE)])
    assert [(row["guest"], row["side"], row["rounds"]) for row in rows] == [
        (GUEST.name, OURS, 6),
        (GUEST.name, PREEMPT, 3),
        (GUEST.name, PLAIN, 3),
        (IDLE.name, OURS, 1),
    ]


def test_sides_take_turns_and_ours_runs_beside_each_of_qemus_settings() -> None:
    sides = [turn.side for turn in turns(shapes(quick=True), ROUNDS)]
    assert set(sides) == set(SIDES)
    assert all(side == OURS for side in sides[::2])
    assert all(side != OURS for side in sides[1::2])
    assert len(sides) == len(shapes(quick=True)) * ROUNDS * 4
