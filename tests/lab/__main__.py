"""Runs the suites on each kernel and prints, for each suite, what passed, failed and was skipped, and the minutes."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lab import linux_guest
from tests.lab.debian import CACHE, LackingError, kernel, say
from tests.lab.guest import end_by_signal, run_in
from tests.lab.suites import SHORT, SUITES, Counts, Result, Suite, results, script, suites_named

KERNELS = ("6.12", "6.18", "7.3")
LIMIT_S = 3600.0
MEMORY = "6G"
COLUMNS = ("kernel", "suite", "passed", "failed", "skipped", "minutes")
NOT_RUN = Result(Counts(0, 1, 0), 0)


def run_suites(version: str, suites: Sequence[Suite], out: Path) -> tuple[str, dict[str, Result]]:
    """The kernel's release, and the results, as they come also on the screen.

    Raises: LackingError: there is no such kernel, or no emulator.
    """
    booted = kernel(version)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shown: set[str] = set()

    def show() -> None:
        for name, result in results(out, suites).items():
            if name not in shown:
                shown.add(name)
                say("  ".join(row(booted.release, name, result)))

    ended = run_in(booted, script(suites, linux_guest.made(booted)), out, memory=MEMORY, limit_s=LIMIT_S, look=show)
    say(f"{booted.release}: {ended.elapsed_s:.0f} s, {ended.cpu_s:.0f} s of processor time; logs in {out}")
    found = results(out, suites)
    return booted.release, {suite.name: found.get(suite.name, NOT_RUN) for suite in suites}


def row(release: str, name: str, result: Result) -> tuple[str, ...]:
    counts = result.counts
    numbers = (str(number) for number in (counts.passed, counts.failed, counts.skipped))
    return release, name, *numbers, f"{result.seconds / 60:.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.lab", description=__doc__)
    parser.add_argument("kernels", nargs="*", default=KERNELS, help="versions, or begins of some (6.12 6.18 7.3)")
    parser.add_argument("--short", action="store_true", help="kernel facts and real memory errors only")
    parser.add_argument("--only", action="append", choices=SUITES, help="this suite; may be given several times")
    arguments = parser.parse_args()
    end_by_signal()
    suites = suites_named(arguments.only or (SHORT if arguments.short else SUITES))
    rows: list[Sequence[str]] = []
    failed = 0
    for version in arguments.kernels:
        try:
            release, found = run_suites(version, suites, CACHE / "out" / version)
        except LackingError as error:
            say(f"{version} is skipped: {error}")
            rows.append((version, "skipped", "", "", "", ""))
            continue
        rows += [row(release, name, result) for name, result in found.items()]
        failed += sum(result.counts.failed for result in found.values())
    sys.stdout.write(table(rows) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
