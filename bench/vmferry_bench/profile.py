"""`vmferry-profile`: where a fault spends its time: stage by stage, and by samples of the pagers during a move."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from vmferry.demo.admin import AdminError
from vmferry.errors import VmferryError
from vmferry_bench import sampler
from vmferry_bench.machine import machine
from vmferry_bench.native import BenchError
from vmferry_bench.network import enter_own_network
from vmferry_bench.ours import our_side
from vmferry_bench.phases import shares
from vmferry_bench.plan import Turn
from vmferry_bench.sampler import Sampler
from vmferry_bench.shape import OURS, Shape
from vmferry_bench.stages import measure_stages, stages_table
from vmferry_bench.table import machine_paragraph, put, write_raw


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="vmferry-profile", description=__doc__)
    options.add_argument(
        "--directory", type=Path, default=Path("profile"), help="for flame graphs and tables (profile)"
    )
    options.add_argument("--docs", type=Path, metavar="DIRECTORY", help="renew the tables of docs/performance")
    options.add_argument("--memory-mib", type=int, default=2048, help="of the guest that is moved (2048)")
    options.add_argument("--workload", default="random", help="of the guest that is moved (random)")
    options.add_argument("--backing", default="memfd", help="of the guest that is moved (memfd)")
    return options


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Stages, samples, and why there are no samples, if there are none."""
    shape = Shape(options.workload, options.memory_mib, backing=options.backing)
    found: dict[str, Any] = {"machine": machine(), "guest": shape.name, "stages": await measure_stages()}
    if not sampler.usable():
        return found | {"samples": {}, "without": f"{sampler.PERF} is not installed"}
    samples = Sampler(options.directory)
    try:
        async with our_side() as ours:
            one = await ours.move(Turn(OURS, shape, 0), samples.around)
        drawn = await samples.draw(shape.name)
    except BenchError as error:
        return found | {"samples": {}, "without": str(error)}
    return found | ({"samples": {}, "without": one.faults} if one.faults else {"samples": drawn, "without": ""})


def stages_text(found: dict[str, Any]) -> str:
    """The machine, and the stages of a fault."""
    return "\n".join([machine_paragraph(found), "", *stages_table(found["stages"])])


def samples_text(found: dict[str, Any]) -> str:
    """The share of each phase, or why there is none."""
    if found["samples"]:
        return "\n".join([f"Guest: {found['guest']}.", "", *shares(found["samples"])])
    return f"The pagers were not sampled: {found['without']}."


def write_docs(directory: Path, found: dict[str, Any]) -> None:
    """Renews the stages in `one-fault.md`, and writes the samples to `raw/profile.md`."""
    put(directory / "one-fault.md", stages_text(found))
    write_raw(directory, "profile", samples_text(found))


def main() -> int:
    options = parser().parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    why = enter_own_network()
    if why:
        print(f"The floor is paced as this host does it: {why}", file=sys.stderr)
    try:
        found = asyncio.run(measure(options))
        words = f"{stages_text(found)}\n\n{samples_text(found)}"
        (options.directory / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.directory / "table.md").write_text(words + "\n")
        if options.docs:
            write_docs(options.docs, found)
    except (BenchError, VmferryError, AdminError, TimeoutError, OSError) as error:
        print(f"vmferry-profile: {error or type(error).__name__}", file=sys.stderr)
        return 1
    print(words)
    return 0 if found["samples"] else 1


if __name__ == "__main__":
    sys.exit(main())
