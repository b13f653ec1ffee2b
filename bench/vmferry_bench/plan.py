"""The rounds of a run, and their order: pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmferry_bench.shape import ADOPTED, BACKINGS, BOUND, ITSELF, OURS, PLAIN, PREEMPT, TRACED, Shape

ROUNDS = 5
"""Each has a turn of vmferry before each turn of QEMU."""
LIMIT_MIB_S = 256
"""A limit that an operator may give the push, so that other traffic has the rest."""
MANY_PAUSE_US = 2000
"""After each touch of VMs that touch at the same time: so few faults that 16 of them do not fill two cores."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One move to be made."""

    side: str
    shape: Shape
    number: int


def guest(backing: str) -> Shape:
    """The guest that most goals are about; each other differs from it in one or two things."""
    return Shape("random", backing=backing)


def limited(backing: str) -> Shape:
    """The same, with a limited push."""
    return replace(guest(backing), push_mib_s=LIMIT_MIB_S)


def idle(backing: str) -> Shape:
    """The guest of the goals about a push that nobody disturbs."""
    return Shape("idle", backing=backing)


def shapes(quick: bool) -> list[Shape]:
    """The guests, those of goals first."""
    if quick:
        return [guest("memfd"), guest("anonymous"), idle("memfd")]
    others = [Shape("hot"), Shape("paced"), Shape("random", vcpus=2), Shape("random", memory_mib=2048)]
    return [
        *map(guest, BACKINGS),
        *map(idle, BACKINGS),
        *map(limited, BACKINGS),
        *(replace(shape, backing=backing) for shape in others for backing in BACKINGS),
        Shape("idle", memory_mib=2048, backing="memfd"),
    ]


def turns(guests: list[Shape], rounds: int, quick: bool) -> list[Turn]:
    """Ours, QEMU at its best, ours, and so on, a round of all guests after the other. So a disturbance of the machine
    hits both sides alike, and a run that must end early has all guests. The guests of most goals have QEMU's other
    setting too, behind further turns of ours. They and the idle ones are also served by the bound. A traced turn comes
    once, behind a guest's first round. An adopted QEMU and the same by itself move the guests of most goals."""
    found: list[Turn] = []
    for number in range(rounds):
        for shape in guests:
            order: tuple[str, ...] = (OURS, PREEMPT)
            if not quick and shape in map(guest, BACKINGS):
                order = (OURS, PREEMPT, OURS, PLAIN)
            if shape in map(guest, BACKINGS):
                order = (*order, ADOPTED, ITSELF)
            if not quick and shape in (*map(guest, BACKINGS), *map(idle, BACKINGS)):
                order = (*order, BOUND)
            if number == 0 and shape.workload != "idle":
                order = (*order, TRACED)
            found += [Turn(side, shape, number) for side in order]
    return found
