"""SVG plots, written by hand: the latency of waits as cumulative shares, and throughput round by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from vmferry_bench.figures import count, figures, merged, waited
from vmferry_bench.goals import select
from vmferry_bench.plan import guest
from vmferry_bench.shape import BACKINGS, OURS, PLAIN, PREEMPT, SIDES, Bucket, Round, Shape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 960, 420, 64, 64, 40, 20
COLOURS = {OURS: "#0a7d4f", PREEMPT: "#c2410c", PLAIN: "#6b7280"}
_SMALL = "style='font-size:9px'"
_STYLE = "font-family='system-ui,sans-serif' font-size='12' fill='#374151'"


class Frame:
    """Axes, and where a value is in them. `decades`: the horizontal one is logarithmic."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], decades: bool) -> None:
        self._x, self._y, self._decades = x, y, decades
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>",
            f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        ]

    def at(self, x: float, y: float) -> tuple[float, float]:
        low, high = self._x
        share = math.log(x / low) / math.log(high / low) if self._decades else (x - low) / (high - low)
        up = (y - self._y[0]) / (self._y[1] - self._y[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def text(self, x: float, y: float, words: str, anchor: str = "middle", extra: str = "") -> None:
        self.parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {_STYLE} {extra}>{escape(words)}</text>"
        )

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'/>")

    def axes(self, xs: Sequence[tuple[float, str]], ys: Sequence[tuple[float, str]], title: str, below: str) -> None:
        for value, words in ys:
            left, right = self.at(self._x[0], value), self.at(self._x[1], value)
            self.line([left, right], "#e5e7eb")
            self.text(left[0] - 8, left[1] + 4, words, "end")
        for value, words in xs:
            x, y = self.at(value, self._y[0])
            self.line([(x, y), (x, y + 5)], "#374151")
            self.text(x, y + 18, words)
        self.line([self.at(self._x[0], self._y[0]), self.at(self._x[1], self._y[0])], "#374151")
        self.text(WIDTH / 2, 20, title, extra="font-weight='600'")
        self.text(WIDTH / 2, HEIGHT - 8, below)

    def legend(self, sides: Sequence[str]) -> None:
        for n, side in enumerate(sides):
            y = TOP + 14 + 18 * n
            self.line([(LEFT + 12, y - 4), (LEFT + 36, y - 4)], COLOURS[side], 3)
            self.text(LEFT + 42, y, side, "start")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def latency(rounds: Sequence[Round], shape: Shape) -> str:
    """Which share of the waits was over within a time."""
    parts = {side: merged(waited(one.buckets) for one in select(rounds, side, shape)) for side in SIDES}
    known = {side: buckets for side, buckets in parts.items() if buckets}
    longest = max((buckets[-1][1] for buckets in known.values()), default=100.0)
    decades = max(math.ceil(math.log10(longest)), 3)
    frame = Frame((30.0, 10.0**decades), (0, 1), decades=True)
    marks = [(10.0**n, _time(10.0**n)) for n in range(2, decades + 1)]
    shares = [(q / 4, f"{q * 25} %") for q in range(5)]
    frame.axes(marks, shares, f"First touch → resumed, touches that waited: {shape.name}", "at most")
    for side, buckets in known.items():
        frame.line([frame.at(x, y) for x, y in _steps(buckets)], COLOURS[side], 2)
    frame.legend(list(known))
    return frame.svg()


def _time(us: float) -> str:
    return f"{us:g} µs" if us < 1000 else f"{us / 1000:g} ms" if us < 1e6 else f"{us / 1e6:g} s"


def _steps(buckets: Sequence[Bucket]) -> list[tuple[float, float]]:
    total, seen = count(buckets), 0
    points = [(buckets[0][0], 0.0)]
    for _, high, n in buckets:
        seen += n
        points.append((high, seen / total))
    return points


def throughput(rounds: Sequence[Round]) -> str:
    """GiB/s to the last page, where nothing limits it: a bar for the median of a side with a guest, a line for its
    spread."""
    shapes = list(dict.fromkeys(one.shape for one in rounds if not one.shape.push_mib_s))
    values = {
        (shape, side): sorted(figures(one)["throughput_gib_s"] for one in select(rounds, side, shape))
        for shape in shapes
        for side in SIDES
    }
    most = max((row[-1] for row in values.values() if row), default=1.0)
    frame = Frame((0, max(len(shapes), 1)), (0, most * 1.25), decades=False)
    step = max(round(most / 5, 1), 0.1)
    ticks = [(n * step, f"{n * step:.1f}") for n in range(int(most * 1.2 / step) + 1)]
    marks = [(n + 0.5, "") for n in range(len(shapes))]
    frame.axes(
        marks,
        ticks,
        "Throughput until the last page, GiB/s",
        "guest; its memory, MiB, and vCPUs (median; line: least to most)",
    )
    for n, shape in enumerate(shapes):
        x, y = frame.at(n + 0.5, 0)
        frame.text(x, y + 16, f"{shape.workload}, {'memfd' if shape.backing == 'memfd' else 'anon'}", extra=_SMALL)
        frame.text(x, y + 30, f"{shape.memory_mib}, {shape.vcpus}", extra=_SMALL)
        for m, side in enumerate(SIDES):
            if values[shape, side]:
                _bar(frame, n + 0.14 + 0.24 * m, values[shape, side], COLOURS[side])
    frame.legend([side for side in SIDES if any(values[shape, side] for shape in shapes)])
    return frame.svg()


def _bar(frame: Frame, at: float, row: Sequence[float], colour: str) -> None:
    left, top = frame.at(at, row[len(row) // 2])
    right, bottom = frame.at(at + 0.22, 0)
    frame.parts.append(
        f"<rect x='{left:.1f}' y='{top:.1f}' width='{right - left:.1f}' height='{bottom - top:.1f}' "
        f"fill='{colour}' fill-opacity='0.8'/>"
    )
    middle = (left + right) / 2
    frame.line([(middle, frame.at(0, row[0])[1]), (middle, frame.at(0, row[-1])[1])], "#111827", 1.5)


def plot_all(rounds: Sequence[Round], directory: Path) -> list[Path]:
    """Writes `latency-BACKING.svg`, of the guest of most goals, for each that was measured, and `throughput.svg`."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {one.shape for one in rounds}
    drawn = {f"latency-{backing}": latency(rounds, guest(backing)) for backing in BACKINGS if guest(backing) in shapes}
    if rounds:
        drawn["throughput"] = throughput(rounds)
    for name, text in drawn.items():
        (directory / f"{name}.svg").write_text(text)
    return [directory / f"{name}.svg" for name in drawn]
