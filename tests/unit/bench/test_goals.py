"""Goals: reached, missed, not measured; never one for the other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from vmferry_bench.goals import Goal, Judge, summary
from vmferry_bench.plan import guest
from vmferry_bench.shape import (
    ADOPTED,
    APART,
    BOUND,
    ITSELF,
    OURS,
    PLAIN,
    PREEMPT,
    TRACED,
    Alone,
    Many,
    Round,
    Singles,
    alone_of,
    round_of,
)

from tests.support.bench_rounds import GUEST, IDLE, a_round

SINGLES = Singles(floor_us={"p50": 90.0}, idle_us={"p50": 99.0}, poison_us={"p50": 80.0}, data_us={"p50": 100.0})


def many(vms: int, pause_us: int, rates: list[float]) -> Many:
    return Many(vms, pause_us, rates, [100.0] * vms, [200.0] * vms, 0.75)


ALONE = Alone(
    {"memfd": SINGLES, f"memfd{APART}": replace(SINGLES, idle_us={"p50": 72.0})},
    [
        many(1, 2000, [100.0]),
        many(4, 2000, [99.0] * 4),
        many(16, 2000, [70.0, *[80.0] * 14, 160.0]),
        many(16, 0, [100.0, *[150.0] * 14, 180.0]),
    ],
    {"pages": 4.0},
)


def judged(rounds: list[Round], alone: Alone = ALONE) -> dict[str, Goal]:
    return {goal.measure: goal for goal in Judge(rounds, alone).goals()}


def both(**ours: object) -> list[Round]:
    """Rounds in the order in which they are run."""
    sides = [OURS, PREEMPT, OURS, PLAIN] * 3
    return [a_round(side, number=n, **(ours if side == OURS else {})) for n, side in enumerate(sides)]  # type: ignore[arg-type]


def test_a_ratio_that_is_small_enough_is_met() -> None:
    goal = judged(both(wait_us=250.0))["memfd: first touch → resumed, p50, to QEMU"]
    assert goal.value == pytest.approx(0.25)
    assert goal.met is True
    assert (goal.low, goal.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_a_ratio_that_is_too_large_is_not() -> None:
    goals = judged(both(wait_us=500.0))
    assert goals["memfd: first touch → resumed, p50, to QEMU"].met is False
    assert goals["memfd: first touch → resumed, p99, µs"].met is False
    assert goals["memfd: guest blocked time, to QEMU"].met is False


def test_throughput_must_be_at_least_its_goal() -> None:
    goals = judged(both(postcopy_s=0.25))
    assert goals["memfd: throughput to the last page, guest random, to QEMU"].met is True
    goals = judged(both(postcopy_s=0.26))
    assert goals["memfd: throughput to the last page, guest random, to QEMU"].met is False


def test_an_unmeasured_goal_is_neither_met_nor_missed() -> None:
    goals = judged([a_round(OURS)], Alone())
    missing = {measure for measure, goal in goals.items() if goal.value is None}
    assert "memfd: throughput to the last page, guest idle, to QEMU" in missing
    assert "memfd: first touch → resumed, p50, to QEMU" in missing
    assert "memfd: poisoned page / data page, answer, p50" in missing
    assert all(goals[measure].met is None for measure in missing)
    assert goals["memfd: first touch → resumed, p50, µs"].met is False


def test_an_adopted_qemu_is_compared_with_the_same_qemu_by_itself() -> None:
    rounds = [a_round(ADOPTED, number=0, wait_us=250.0), a_round(ITSELF, number=1), a_round(PREEMPT, number=2)]
    goals = judged(rounds)
    assert goals["memfd: first touch → resumed, p50, adopted QEMU, to the same QEMU by itself"].met is True
    assert goals["memfd: throughput, adopted QEMU, to the same QEMU by itself"].met is False
    assert goals["memfd: first touch → resumed, p50, to QEMU"].met is None


def test_a_long_stop_of_a_thread_misses_its_goal() -> None:
    measure = "adopted QEMU: stop of an idle thread for a system call, p99, µs"
    assert judged([], Alone())[measure].met is None
    assert judged([], Alone(injected_us={"p50": 90.0, "p99": 120.0, "max": 2000.0}))[measure].met is True
    assert judged([], Alone(injected_us={"p50": 90.0, "p99": 1200.0, "max": 2000.0}))[measure].met is False


def test_a_push_that_is_limited_is_judged_by_itself() -> None:
    beside = replace(GUEST, push_mib_s=256)
    theirs = a_round(PREEMPT, beside, number=1, wait_us=1000.0)
    goals = judged([*both(wait_us=500.0), a_round(OURS, beside, number=0, wait_us=90.0), theirs])
    assert goals["memfd: first touch → resumed, p50, to QEMU"].value == pytest.approx(0.5)
    limited = goals["memfd: first touch → resumed, p50, to QEMU, push limited to 256 MiB/s"]
    assert (limited.value, limited.met) == (pytest.approx(0.09), True)


def test_the_bound_is_shown_with_its_figures_and_judges_nothing() -> None:
    none = {"blackout_guest_s": None, "blackout_vmm_s": None, "total_s": None}
    served = a_round(BOUND, wait_us=100.0, postcopy_s=0.1, machinery_cpu_s=0.1, number=6, **none)
    goals, before = judged([*both(wait_us=500.0), served]), judged(both(wait_us=500.0))
    for measure, bound in (
        ("memfd: first touch → resumed, p50, to QEMU", 0.1),
        ("memfd: first touch → resumed, p99, µs", 100.0),
        ("memfd: worst first touch, ms", 0.1),
        ("memfd: throughput to the last page, guest random, to QEMU", 5.0),
        ("memfd: CPU seconds a GiB, both ends, guest random, to QEMU", 0.4),
        ("memfd: stop → first instruction, to QEMU", None),
    ):
        assert goals[measure].bound == (bound if bound is None else pytest.approx(bound, rel=0.01))
    assert {measure: replace(goal, bound=None) for measure, goal in goals.items()} == before


def test_void_rounds_do_not_count() -> None:
    rounds = [*both(wait_us=250.0), a_round(OURS, wait_us=9e6, faults="a page was lost")]
    assert judged(rounds)["memfd: worst first touch, ms"].value == pytest.approx(0.25)


def test_figures_of_ours_alone() -> None:
    goals = judged(both())
    assert goals["memfd: first touch, nothing else on the link, p50, to the floor"].value == pytest.approx(1.1)
    assert goals["memfd: poisoned page / data page, answer, p50"].met is True
    apart = "memfd: first touch, nothing else on the link, p50, to the floor, each end on a CPU of its own"
    assert goals[apart].value == pytest.approx(0.8)
    fall = goals["memfd: faults/s a VM, 1 → 16 VMs, fall, a pause of 2 ms"]
    assert fall.value == pytest.approx(0.2)
    assert fall.words == "75% of the cores busy with 16"
    assert goals["memfd: faults/s of 16 VMs, most to least, a pause of 2 ms"].met is False
    assert goals["memfd: faults/s of 16 VMs, most to least, no pause, cores full"].met is True


def test_vms_at_once_are_judged_by_the_middle_of_their_rounds() -> None:
    rounds = [many(16, 0, [100.0, *[150.0] * 14, high]) for high in (150.0, 900.0, 180.0)]
    goal = judged([], Alone(many=rounds))["memfd: faults/s of 16 VMs, most to least, no pause, cores full"]
    assert (goal.value, goal.low, goal.high, goal.met) == (1.8, 1.5, 9.0, True)


def test_a_vm_that_starves_is_a_goal_missed_by_far() -> None:
    starved = Alone(many=[many(16, 0, [0.0, *[150.0] * 15])])
    goal = judged([], starved)["memfd: faults/s of 16 VMs, most to least, no pause, cores full"]
    assert (goal.value, goal.met) == (None, False)


def test_each_backing_is_judged_by_its_own_rounds() -> None:
    anonymous = [replace(one, shape=guest("anonymous")) for one in both(wait_us=500.0)]
    goals = judged([*both(wait_us=250.0), *anonymous])
    assert goals["memfd: first touch → resumed, p50, to QEMU"].met is True
    assert goals["anonymous: first touch → resumed, p50, to QEMU"].met is False
    assert goals["anonymous: poisoned page / data page, answer, p50"].met is None


def test_the_page_table_is_the_middle_of_its_figures() -> None:
    assert judged(both(table_bytes_per_page=1.0))["page table, bytes a page"].met is True
    assert judged(both())["page table, bytes a page"].met is None


def test_goals_and_rounds_are_json_and_rounds_come_back() -> None:
    rounds = both()
    goals = Judge(rounds, Alone()).goals()
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


def test_a_traced_round_is_compared_with_nothing() -> None:
    slow = a_round(TRACED, wait_us=9e6, number=99)
    assert judged([*both(wait_us=250.0), slow]) == judged(both(wait_us=250.0))
    assert [row["side"] for row in summary([slow])] == [TRACED]


def test_figures_measured_alone_come_back_from_json() -> None:
    assert alone_of(json.loads(json.dumps(asdict(ALONE)))) == ALONE
