"""The suites that run in a guest, and how their results are counted. Each leaves a log in `/out`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import linux_guest
from tests.lab.debian import CACHE, ROOT
from tests.lab.linux_guest import LinuxGuest
from tests.support import c_programs

PATIENCE = 4
"""The guest is slower than a machine by about as much."""
HUGE_PAGES = 64
COMPILED = CACHE / "c"
REAL_ERRORS = ("tests/contract/test_real_errors.py", "tests/contract/test_real_errors_of_a_destination.py")
PACKAGES = {"pager": "vmferry-pager", "refvm": "vmferry-refvm"}
"""Of the suites of Rust tests, which have the names of their folders."""
SHORT = ("kernel", "real-errors")
SUITES = (*SHORT, "linux-guest", *PACKAGES, "demo")


@dataclass(frozen=True, slots=True)
class Counts:
    passed: int
    failed: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Suite:
    """`count` reads the results of one that ended by itself."""

    name: str
    commands: tuple[str, ...]
    count: Callable[[Path, str], Counts]
    limit_s: int = 900


@dataclass(frozen=True, slots=True)
class Result:
    counts: Counts
    seconds: int


def pytest_counts(out: Path, name: str) -> Counts:
    """Of pytest's report. A suite that wrote none has failed."""
    if not (out / f"{name}.xml").exists():
        return Counts(0, 1, 0)
    (report,) = ET.parse(out / f"{name}.xml").getroot().iter("testsuite")
    total, skipped = int(report.attrib["tests"]), int(report.attrib["skipped"])
    failed = int(report.attrib["failures"]) + int(report.attrib["errors"])
    return Counts(total - failed - skipped, failed, skipped)


def rust_counts(out: Path, name: str) -> Counts:
    """Of the lines of Rust's test harness. A test that prints `SKIPPED` counts as passed there."""
    text = (out / f"{name}.log").read_text(errors="replace")
    ended = re.findall(r"^test result: \w+\. (\d+) passed; (\d+) failed", text, re.MULTILINE)
    skipped = len(re.findall(r"SKIPPED", text))
    passed, failed = (sum(int(part[column]) for part in ended) for column in (0, 1))
    missing = len(re.findall(r"^lab: runs ", text, re.MULTILINE)) - len(ended)
    return Counts(max(0, passed - skipped), failed + missing, skipped)


def run_counts(out: Path, name: str) -> Counts:
    """Of commands that each pass or fail as a whole."""
    statuses = re.findall(r"^lab: status (\d+)$", (out / f"{name}.log").read_text(errors="replace"), re.MULTILINE)
    return Counts(statuses.count("0"), len(statuses) - statuses.count("0"), 0)


def pytest_suite(name: str, *words: str) -> Suite:
    python = f"{ROOT}/.venv/bin/python -m pytest -p no:cacheprovider -q"
    return Suite(name, (f"{python} --junitxml=/out/{name}.xml {shlex.join(words)}",), pytest_counts)


def rust_suite(name: str, binaries: Iterable[tuple[str, Path]]) -> Suite:
    """Test programs, each in the folder of its package, as cargo runs them."""
    commands = (f"cd {ROOT}/{folder} && {shlex.quote(str(program))} --nocapture" for folder, program in binaries)
    return Suite(name, tuple(commands), rust_counts)


def rust_binaries() -> dict[str, list[tuple[str, Path]]]:
    """The test programs of each suite of Rust tests, built here: folder of the package and path.

    Raises: CalledProcessError: they do not compile.
    """
    packages = [word for package in PACKAGES.values() for word in ("-p", package)]
    command = ["cargo", "test", "--release", "--locked", "--no-run", "--message-format=json", *packages]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True)
    found: dict[str, list[tuple[str, Path]]] = {name: [] for name in PACKAGES}
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            folder = Path(message["manifest_path"]).parent.name
            if folder in found:
                found[folder].append((folder, Path(message["executable"])))
    return found


def suites_named(names: Iterable[str]) -> list[Suite]:
    """The suites of these names, with their programs compiled.

    Raises: CalledProcessError: it does not compile.
    """
    shutil.rmtree(COMPILED, ignore_errors=True)
    COMPILED.mkdir(parents=True)
    c_programs.compile_all(COMPILED)
    built = rust_binaries() if set(PACKAGES) & set(names) else {}
    demo = f"{ROOT}/.venv/bin/vmferry demo --memory 64M --poison 8,4 --real-frames --backing memfd"
    makers: dict[str, Callable[[str], Suite]] = {
        "kernel": lambda name: pytest_suite(name, "tests/kernel"),
        "real-errors": lambda name: pytest_suite(name, *REAL_ERRORS),
        "linux-guest": lambda name: pytest_suite(name, "tests/lab"),
        "pager": lambda name: rust_suite(name, built[name]),
        "refvm": lambda name: rust_suite(name, built[name]),
        "demo": lambda name: Suite(name, (demo,), run_counts),
    }
    return [makers[name](name) for name in names]


def script(suites: Iterable[Suite], linux: LinuxGuest) -> str:
    """The commands of the guest. Each suite leaves a line in /out/results: its name and seconds."""
    lines = [f"export VMFERRY_PATIENCE={PATIENCE} VMFERRY_TEST_HWPOISON=1 {c_programs.VARIABLE}={COMPILED}"]
    lines.append(f"export {linux_guest.VARIABLE}={shlex.quote(linux.encode())}")
    # Each bad one stays in the pool: tests that set a few aside find good ones for sure.
    lines.append(f"echo {HUGE_PAGES} >/proc/sys/vm/nr_hugepages")
    for suite in suites:
        lines.append("began=$(date +%s)")
        for command in suite.commands:
            inner = shlex.quote(f"cd {ROOT}; {command}")
            lines.append(f"{{ echo lab: runs {shlex.quote(command)}; timeout -k 10 {suite.limit_s} bash -c {inner}")
            lines.append(f'echo "lab: status $?"; }} >>/out/{suite.name}.log 2>&1 </dev/null')
        lines.append(f'echo "{suite.name} $(($(date +%s) - began))" >>/out/results')
    return "\n".join(lines)


def results(out: Path, suites: Iterable[Suite]) -> dict[str, Result]:
    """Of the suites that have ended."""
    if not (out / "results").exists():
        return {}
    ended = dict(line.split() for line in (out / "results").read_text().splitlines())
    return {
        suite.name: Result(suite.count(out, suite.name), int(ended[suite.name]))
        for suite in suites
        if suite.name in ended
    }
