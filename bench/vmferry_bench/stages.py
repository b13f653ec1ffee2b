"""The stages of one fault, each measured by itself, and whole faults."""

from __future__ import annotations

from typing import Any

from vmferry_bench.alone import PAUSE_US, TOUCHES, floor, idle
from vmferry_bench.figures import quantiles
from vmferry_bench.native import native
from vmferry_bench.pair import ANYWHERE
from vmferry_bench.shape import BACKINGS, Quantiles

STAGES = (
    ("fault", "touch → another thread has read the event from the userfaultfd"),
    ("ask", "16 bytes, `send` → a thread that waits in `recv` has them, loopback"),
    ("read", "4 KiB of the guest read as by the source's pager: {read}"),
    ("reply", "24 bytes and a page, `send` → a thread that waits in `recv` has them, loopback"),
    ("install", "{install} of 4 KiB, nobody waiting"),
    ("wake", "`UFFDIO_WAKE` called → the touch is over"),
)
WHOLES = (
    ("floor", "userfaultfd over TCP and nothing else (the floor)"),
    ("whole", "vmferry, nothing else on the link"),
    ("handler", "of that, its pager: event read → page installed"),
)
_CALLS = {
    "anonymous": {"read": "`process_vm_readv` into a buffer", "install": "`UFFDIO_COPY`"},
    "memfd": {"read": "a look by a mapping of its own", "install": "`UFFDIO_CONTINUE`"},
}


async def measure_stages() -> dict[str, dict[str, Quantiles]]:
    """µs of every stage and whole, by backing."""
    found = {}
    for backing in BACKINGS:
        options = ("--times", str(TOUCHES), "--pause-us", str(PAUSE_US), "--backing", backing)
        stages = await native("stages", *options)
        touches, told = await idle(backing, ANYWHERE)
        found[backing] = {name: quantiles(us) for name, us in stages.items()} | {
            "floor": quantiles(await floor(backing, ANYWHERE)),
            "whole": quantiles(touches),
            "handler": {"count": float(told.count), "p50": told.p50_us, "p90": told.p90_us, "p99": told.p99_us},
        }
    return found


def stages_table(found: dict[str, dict[str, Quantiles]]) -> list[str]:
    """A Markdown table a backing."""
    lines: list[str] = []
    for backing, rows in found.items():
        lines += ["", f"| {backing}: stage | p50, µs | p90, µs | p99, µs |", "|---|---|---|---|"]
        lines += [_row(words.format(**_CALLS[backing]), rows[name]) for name, words in STAGES]
        added = {q: sum(rows[name][q] for name, _ in STAGES) for q in ("p50", "p90", "p99")}
        lines.append(_row("**the stages added up**", added))
        lines += [_row(words, rows[name]) for name, words in WHOLES]
    return lines[1:]


def _row(words: str, times: dict[str, Any]) -> str:
    return f"| {words} | " + " | ".join(f"{times[q]:.1f}" for q in ("p50", "p90", "p99")) + " |"
