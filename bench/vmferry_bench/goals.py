"""The goals, and whether a run reached them: pure. Ratios are to QEMU with postcopy-preempt in that run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vmferry_bench.figures import figures, merged, middle, pairs, quantile, ratios, spread, waited
from vmferry_bench.plan import LIMIT_MIB_S, MANY_PAUSE_US, guest, idle, limited
from vmferry_bench.shape import (
    ADOPTED,
    APART,
    BACKINGS,
    BOUND,
    ITSELF,
    OURS,
    PREEMPT,
    Alone,
    Many,
    Round,
    Shape,
    Singles,
)

NOT_MEASURED = "not measured"
PLAIN_VMM = OURS, PREEMPT
QEMU = ADOPTED, ITSELF
"""Two sides that are compared."""
Sides = tuple[str, str]
_TO_ITSELF = "adopted QEMU, to the same QEMU by itself"
_FASTER = {"memfd": 1.5, "anonymous": 1.0}
"""The goal of the throughput of an adopted QEMU, to its own."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`value` None: not measured in this run; `met` is None then too. `low`, `high`: least and most over the rounds.
    `bound`: the value that the bound has in its place."""

    measure: str
    goal: str
    value: float | None
    met: bool | None
    low: float | None = None
    high: float | None = None
    words: str = ""
    bound: float | None = None


def select(rounds: Iterable[Round], side: str, shape: Shape) -> list[Round]:
    """The rounds of one side with a guest, without void ones."""
    return [one for one in rounds if one.side == side and one.shape == shape and not one.faults]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _within(measure: str, limit: float, values: Sequence[float], value: float, sign: str = "≤") -> Goal:
    low, high = spread(values)
    met = None if math.isnan(value) else (value <= limit if sign == "≤" else value >= limit)
    words = "" if met is not None else NOT_MEASURED
    return Goal(measure, f"{sign} {limit:g}", _known(value), met, _known(low), _known(high), words)


class Judge:
    """Over all rounds of a run. Goals about guest memory are judged for each backing by itself."""

    def __init__(self, rounds: Sequence[Round], alone: Alone) -> None:
        self._rounds = rounds
        self._alone = alone

    def goals(self) -> list[Goal]:
        """All of them, whether measured or not."""
        of_memory = [goal for backing in BACKINGS for goal in self._of(backing)]
        return [*of_memory, self._page_table(), *self._many(), self._injected()]

    def _of(self, backing: str) -> list[Goal]:
        active, still = guest(backing), idle(backing)
        goals = [
            *self._touches(active, ""),
            *self._touches(limited(backing), f", push limited to {LIMIT_MIB_S} MiB/s"),
            *self._singles(
                backing, "first touch, nothing else on the link, p50, to the floor", 1.2, "idle_us", "floor_us"
            ),
            self._ratio("throughput to the last page, guest random, to QEMU", active, "throughput_gib_s", 2, "≥"),
            self._ratio("throughput to the last page, guest idle, to QEMU", still, "throughput_gib_s", 2, "≥"),
            self._ratio("guest blocked time, to QEMU", active, "blocked_s", 0.3),
            self._ratio("stop → first instruction, to QEMU", active, "blackout_ms", 1),
            self._ratio("CPU seconds a GiB, both ends, guest random, to QEMU", active, "cpu_s_per_gib", 0.6),
            self._ratio("CPU seconds a GiB, both ends, guest idle, to QEMU", still, "cpu_s_per_gib", 0.6),
            *self._singles(backing, "poisoned page / data page, answer, p50", 1.0, "poison_us", "data_us"),
            self._pooled_ratio(f"first touch → resumed, p50, {_TO_ITSELF}", active, 0.5, 0.3, sides=QEMU),
            self._pooled_ratio(f"first touch → resumed, p99, {_TO_ITSELF}", active, 0.99, 0.1, sides=QEMU),
            self._ratio(f"stop → first instruction, {_TO_ITSELF}", active, "blackout_ms", 0.7, sides=QEMU),
            self._ratio(f"throughput, {_TO_ITSELF}", active, "throughput_gib_s", _FASTER[backing], "≥", sides=QEMU),
        ]
        return [replace(goal, measure=f"{backing}: {goal.measure}") for goal in goals]

    def _touches(self, shape: Shape, words: str) -> list[Goal]:
        return [
            self._pooled_ratio(f"first touch → resumed, p50, to QEMU{words}", shape, 0.5, 0.3),
            self._pooled_ratio(f"first touch → resumed, p99, to QEMU{words}", shape, 0.99, 0.1),
            self._pooled(f"first touch → resumed, p50, µs{words}", shape, 0.5, 100),
            self._pooled(f"first touch → resumed, p99, µs{words}", shape, 0.99, 300),
            self._worst(f"worst first touch, ms{words}", shape, 5),
        ]

    def _singles(self, backing: str, measure: str, limit: float, what: str, to: str) -> list[Goal]:
        """Wherever the ends run, and where they are apart."""
        goals = []
        for words in ("", APART):
            single = self._alone.singles.get(f"{backing}{words}", Singles())
            goals.append(_of_medians(f"{measure}{words}", limit, getattr(single, what), getattr(single, to)))
        return goals

    def _values(self, side: str, shape: Shape, key: str) -> list[float]:
        return [figures(one)[key] for one in select(self._rounds, side, shape)]

    def _ratio(
        self, measure: str, shape: Shape, key: str, limit: float, sign: str = "≤", *, sides: Sides = PLAIN_VMM
    ) -> Goal:
        """Of the medians of all rounds; the spread is that of the rounds that ran one after the other."""
        own, other = sides
        below = middle(self._values(other, shape, key))

        def value(side: str) -> float:
            return middle(self._values(side, shape, key)) / below if below > 0 else math.nan

        each = ((figures(a)[key], figures(b)[key]) for a, b in self._pairs(shape, sides))
        bound = _known(value(BOUND)) if own == OURS else None
        return replace(_within(measure, limit, ratios(each), value(own), sign), bound=bound)

    def _pairs(self, shape: Shape, sides: Sides) -> list[tuple[Round, Round]]:
        own, other = sides
        return pairs(select(self._rounds, own, shape), select(self._rounds, other, shape))

    def _pool(self, side: str, shape: Shape, q: float) -> float:
        return quantile(merged(waited(one.buckets) for one in select(self._rounds, side, shape)), q)

    def _pooled(self, measure: str, shape: Shape, q: float, limit: float) -> Goal:
        each = [quantile(waited(one.buckets), q) for one in select(self._rounds, OURS, shape)]
        bound = _known(self._pool(BOUND, shape, q))
        return replace(_within(measure, limit, each, self._pool(OURS, shape, q)), bound=bound)

    def _pooled_ratio(self, measure: str, shape: Shape, q: float, limit: float, *, sides: Sides = PLAIN_VMM) -> Goal:
        """Of the waits of all rounds together."""
        own, other = sides
        theirs = self._pool(other, shape, q)

        def value(side: str) -> float:
            return self._pool(side, shape, q) / theirs if theirs > 0 else math.nan

        each = ((quantile(waited(a.buckets), q), quantile(waited(b.buckets), q)) for a, b in self._pairs(shape, sides))
        bound = _known(value(BOUND)) if own == OURS else None
        return replace(_within(measure, limit, ratios(each), value(own)), bound=bound)

    def _worst(self, measure: str, shape: Shape, limit: float) -> Goal:
        def values(side: str) -> list[float]:
            return [us / 1e3 for us in self._values(side, shape, "first_touch_max_us")]

        value, bound = (max(values(side), default=math.nan) for side in (OURS, BOUND))
        return replace(_within(measure, limit, values(OURS), value), bound=_known(bound))

    def _many(self) -> list[Goal]:
        def rows(vms: int, pauses: bool) -> list[Many]:
            return [row for row in self._alone.many if row.vms == vms and (row.pause_us > 0) == pauses]

        few, many, eager = rows(1, True), rows(16, True), rows(16, False)
        falls = [1 - middle(b.rates) / middle(a.rates) for a, b in zip(few, many, strict=False)]
        busy = f"{middle(row.busy for row in many):.0%} of the cores busy with 16" if many else NOT_MEASURED
        pause = f"a pause of {MANY_PAUSE_US / 1e3:g} ms"
        return [
            replace(_middle(f"memfd: faults/s a VM, 1 → 16 VMs, fall, {pause}", 0.2, falls), words=busy),
            _middle(f"memfd: faults/s of 16 VMs, most to least, {pause}", 2, map(_unfair, many)),
            _middle("memfd: faults/s of 16 VMs, most to least, no pause, cores full", 2, map(_unfair, eager)),
        ]

    def _injected(self) -> Goal:
        found = self._alone.injected_us
        values = [found[key] for key in ("p50", "p99", "max")] if found else []
        value = values[1] if values else math.nan
        return _within("adopted QEMU: stop of an idle thread for a system call, p99, µs", 1000, values, value)

    def _page_table(self) -> Goal:
        sizes = [one.table_bytes_per_page for one in self._rounds if one.table_bytes_per_page is not None]
        return _middle("page table, bytes a page", 1.0, sizes)


def _middle(measure: str, limit: float, values: Iterable[float]) -> Goal:
    every = list(values)
    return _within(measure, limit, every, middle(every))


def _of_medians(measure: str, limit: float, above: Mapping[str, float], below: Mapping[str, float]) -> Goal:
    return _within(measure, limit, [], above["p50"] / below["p50"] if above and below else math.nan)


def _unfair(row: Many) -> float:
    return row.rates[-1] / row.rates[0] if row.rates[0] > 0 else math.inf


def summary(rounds: Sequence[Round]) -> list[dict[str, object]]:
    """Medians and spreads of every side with every guest, in the order of the rounds."""
    keys = dict.fromkeys((one.shape, one.side) for one in rounds)
    rows: list[dict[str, object]] = []
    for shape, side in sorted(keys, key=lambda key: [k[0] for k in keys].index(key[0])):
        chosen = select(rounds, side, shape)
        row: dict[str, object] = {"guest": shape.name, "side": side, "rounds": len(chosen)}
        for name, values in _columns(chosen).items():
            low, high = spread(values)
            row[name] = {"median": _known(middle(values)), "low": _known(low), "high": _known(high)}
        rows.append(row)
    return rows


def _columns(rounds: Sequence[Round]) -> Mapping[str, list[float]]:
    every = [figures(one) for one in rounds]
    return {name: [one[name] for one in every] for name in (every[0] if every else {})}
