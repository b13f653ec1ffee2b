"""Which rounds are run, in which order: pure."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry_bench.shape import OURS, PLAIN, PREEMPT, Shape

ROUNDS = 5
"""Each has two turns of vmferry and one of each setting of QEMU."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One move to be made."""

    side: str
    shape: Shape
    number: int


def shapes(quick: bool) -> list[Shape]:
    """The guests. The first is the one that the goals are about; each other differs from it in one thing."""
    if quick:
        return [Shape("random"), Shape("idle")]
    return [
        Shape("random"),
        Shape("idle"),
        Shape("hot"),
        Shape("paced"),
        Shape("random", backing="memfd"),
        Shape("random", vcpus=2),
        Shape("random", memory_mib=2048),
        Shape("idle", memory_mib=2048),
    ]


def turns(guests: list[Shape], rounds: int) -> list[Turn]:
    """Ours, QEMU at its best, ours, QEMU plain, and so on: a disturbance of the machine hits all sides alike. So ours
    has two turns a round, one beside each setting of QEMU."""
    order = (OURS, PREEMPT, OURS, PLAIN)
    return [Turn(side, shape, number) for shape in guests for number in range(rounds) for side in order]
