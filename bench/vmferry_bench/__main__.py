"""`vmferry-bench`: moves the same guest with vmferry and with QEMU in turn, and prints the results."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from vmferry.demo.admin import AdminError
from vmferry.demo.qemu.program import PROGRAM, chosen_qemu
from vmferry.errors import VmferryError
from vmferry_bench import bound, qemu
from vmferry_bench.alone import measure_alone
from vmferry_bench.figures import figures
from vmferry_bench.goals import Judge, summary
from vmferry_bench.machine import lateness, machine
from vmferry_bench.native import BenchError
from vmferry_bench.network import enter_own_network
from vmferry_bench.ours import OurSide, our_side
from vmferry_bench.plan import ROUNDS, Turn, shapes, turns
from vmferry_bench.plot import plot_all
from vmferry_bench.shape import ADOPTED, BOUND, OURS, SIDES, Alone, Round, alone_of, round_of
from vmferry_bench.table import table, write_docs

ALONE_ROUNDS = 3
QUICK_LIMIT_S = 125.0
"""With --quick no round begins after that. The measurements behind the rounds take half a minute more."""
LIMIT_S = 1800.0
"""The same without --quick; the measurements behind the rounds then take two minutes."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="vmferry-bench", description=__doc__)
    options.add_argument("--quick", action="store_true", help="three guests, at most three minutes")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"with every guest ({ROUNDS})")
    options.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no further round after that")
    options.add_argument("--only", metavar="WORDS", default="", help="only guests whose name has these words")
    options.add_argument("--out", type=Path, metavar="FILE", help="write everything measured as JSON")
    options.add_argument("--docs", type=Path, metavar="DIRECTORY", help="renew tables and plots of docs/performance")
    options.add_argument("--from", dest="read", type=Path, metavar="FILE", help="measure nothing: read an --out FILE")
    return options


async def _turn(ours: OurSide, turn: Turn, number: int) -> Round:
    if turn.side in (OURS, ADOPTED):
        return await ours.move(Turn(turn.side, turn.shape, number))
    if turn.side == BOUND:
        return await bound.serve(turn.shape, number)
    return await qemu.move(turn.side, turn.shape, number)


async def measure(options: argparse.Namespace) -> tuple[list[Round], Alone, list[str]]:
    """All rounds, the measurements of vmferry alone, and each failure in words."""
    rounds: list[Round] = []
    failures: list[str] = []
    guests = [shape for shape in shapes(options.quick) if options.only in shape.name]
    wanted = turns(guests, options.rounds, options.quick)
    end = time.monotonic() + (options.time_limit or (QUICK_LIMIT_S if options.quick else LIMIT_S))
    async with our_side() as ours:
        for number, turn in enumerate(wanted):
            if turn.side not in (OURS, BOUND) and not qemu.usable(turn.side, turn.shape):
                continue
            if time.monotonic() > end:
                failures.append(f"{len(wanted) - number} of {len(wanted)} turns are left out: the time is over")
                print(failures[-1], file=sys.stderr)
                break
            try:
                one = await _turn(ours, turn, number)
            except (BenchError, VmferryError, AdminError, TimeoutError, OSError, grpc.RpcError) as error:
                failures.append(f"{turn.side}, {turn.shape.name}: {error or type(error).__name__}")
                print(f"FAILED  {failures[-1]}", file=sys.stderr)
                continue
            rounds.append(one)
            _say(one)
    try:
        alone = await measure_alone(1 if options.quick else ALONE_ROUNDS, whole=not options.quick)
    except (BenchError, VmferryError, TimeoutError, OSError, grpc.RpcError) as error:
        alone = Alone()
        failures.append(f"{OURS} alone: {error or type(error).__name__}")
        print(f"FAILED  {failures[-1]}", file=sys.stderr)
    return rounds, alone, failures


def _say(one: Round) -> None:
    f = figures(one)
    print(
        f"{one.side:20} {one.shape.name:36} waits {f['waits']:5.0f}  p50 {f['first_touch_p50_us']:7.0f} µs  "
        f"p99 {f['first_touch_p99_us']:7.0f} µs  {f['throughput_gib_s']:5.2f} GiB/s  "
        f"blocked {f['blocked_s'] * 1e3:6.0f} ms  blackout {f['blackout_ms']:6.1f} ms  "
        f"cpu {f['cpu_s_per_gib']:5.2f} s/GiB  {one.faults}".replace(" nan", "   -"),
        file=sys.stderr,
        flush=True,
    )


def result(rounds: list[Round], failures: list[str], alone: Alone, where: dict[str, Any]) -> dict[str, Any]:
    """The whole run as JSON."""
    return {
        "machine": where,
        "goals": [asdict(goal) for goal in Judge(rounds, alone).goals()],
        "summary": summary(rounds),
        "alone": asdict(alone),
        "failures": failures,
        "rounds": [one.plain() for one in rounds],
    }


def faults_of_ours(found: dict[str, Any]) -> list[str]:
    """The faults of vmferry in any round: they fail the run."""
    own = [r for r in found["rounds"] if r["side"] in (OURS, ADOPTED)]
    words = [f"round {r['number']}: {r['faults']}" for r in own if r["faults"]]
    wrong = [f"round {r['number']}: {r['wrong_bytes']} wrong bytes" for r in own if r["wrong_bytes"]]
    return [*words, *wrong, *(failure for failure in found["failures"] if failure.startswith((OURS, ADOPTED)))]


def main() -> int:
    options = parser().parse_args()
    if options.read:
        found = json.loads(options.read.read_text())
        rounds = [round_of(plain) for plain in found["rounds"]]
        found = result(rounds, found["failures"], alone_of(found["alone"]), found["machine"])
    else:
        if chosen_qemu("") is None:
            print(f"{PROGRAM} is not installed: vmferry alone is measured, no ratio.", file=sys.stderr)
        why = enter_own_network()
        if why:
            print(f"QEMU and the floor are paced as this host does it: {why}", file=sys.stderr)
        late = asyncio.run(lateness(3 if options.quick else 10))
        rounds, alone, failures = asyncio.run(measure(options))
        found = result(rounds, failures, alone, {**machine(), "late": late})
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if options.docs:
        plot_all([one for one in rounds if one.side in SIDES], options.docs)
        write_docs(options.docs, found)
    print(table(found))
    faults = faults_of_ours(found)
    for fault in faults:
        print(f"vmferry-bench: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
