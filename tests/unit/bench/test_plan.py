"""Which rounds are run, in which order."""

from __future__ import annotations

from vmferry_bench.plan import ROUNDS, guest, idle, shapes, turns
from vmferry_bench.shape import ADOPTED, BACKINGS, BOUND, ITSELF, OURS, SIDES, TRACED

SHAPES = shapes(quick=False)


def test_ours_runs_before_each_turn_of_qemu() -> None:
    for quick in (True, False):
        sides = [turn.side for turn in turns(shapes(quick), ROUNDS, quick) if turn.side not in (TRACED, BOUND)]
        assert all(side in (OURS, ADOPTED) for side in sides[::2])
        assert all(side not in (OURS, ADOPTED) for side in sides[1::2])
        assert all((a == ADOPTED) == (b == ITSELF) for a, b in zip(sides[::2], sides[1::2], strict=True))
        assert set(sides) == {*(SIDES[:2] if quick else SIDES), ADOPTED, ITSELF}


def test_an_adopted_qemu_moves_the_guests_of_most_goals() -> None:
    planned = turns(shapes(quick=True), 1, quick=True)
    assert [turn.shape for turn in planned if turn.side == ADOPTED] == [guest("memfd"), guest("anonymous")]


def test_every_guest_has_all_rounds_and_one_traced_turn() -> None:
    for quick in (True, False):
        planned = turns(shapes(quick), ROUNDS, quick)
        for shape in shapes(quick):
            sides = [turn.side for turn in planned if turn.shape == shape]
            assert sides.count("qemu-preempt") == ROUNDS >= 5
            assert sides.count(TRACED) == (shape.workload != "idle")


def test_guests_of_most_goals_and_idle_ones_are_served_by_the_bound_behind_all_others() -> None:
    planned = [turn for turn in turns(shapes(quick=False), ROUNDS, quick=False) if turn.side != TRACED]
    served = [turn.shape for turn in planned if turn.side == BOUND]
    assert served == [*map(guest, BACKINGS), *map(idle, BACKINGS)] * ROUNDS
    behind = [a for a, b in zip(planned[1:], planned, strict=False) if b.side == BOUND]
    assert all(turn.side == OURS for turn in behind)
    assert BOUND not in {turn.side for turn in turns(shapes(quick=True), ROUNDS, quick=True)}


def test_a_run_that_ends_early_has_as_many_rounds_of_one_guest_as_of_another() -> None:
    planned = turns(shapes(quick=False), ROUNDS, quick=False)
    for end in range(len(planned)):
        rounds = [
            sum(turn.shape == shape and turn.side == "qemu-preempt" for turn in planned[:end]) for shape in SHAPES
        ]
        assert max(rounds) - min(rounds) <= 1


def test_guests_cover_every_shape() -> None:
    found = shapes(quick=False)
    assert len(set(found)) == len(found)
    for backing in BACKINGS:
        own = [shape for shape in found if shape.backing == backing]
        assert {shape.workload for shape in own} == {"idle", "random", "hot", "paced"}
        assert {shape.memory_mib for shape in own} == {512, 2048}
        assert {shape.vcpus for shape in own} == {1, 2}
        assert [shape.workload for shape in own if shape.push_mib_s] == ["random"]


def test_quick_has_the_guests_of_goals() -> None:
    assert shapes(quick=True) == [guest("memfd"), guest("anonymous"), idle("memfd")]
    assert set(shapes(quick=True)) <= set(shapes(quick=False)[:4])
