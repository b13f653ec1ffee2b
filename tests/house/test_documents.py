"""Promises that documents make about each other and about the tree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.house.files import ROOT, ending, text_of, tracked

SPECIFICATION = Path("docs/reference/specification.md")
DECISIONS = sorted(path for path in ending(".md") if re.match(r"\d{4}-", path.name))
EXPLANATIONS = [path for path in ending(".md") if path.parent == Path("docs/explanation")]
PROMISE = re.compile(r"^\| (?P<words>[^|]+) \| (?P<tests>\[.+) \|$", re.MULTILINE)
TEST = re.compile(r"\[`(\w+)`\]\(\.\./\.\./([\w./-]+)\)")


def promises() -> list[tuple[str, str, str]]:
    """Each promise with the name and the file of one of its tests."""
    return [
        (row["words"], name, path)
        for row in PROMISE.finditer(text_of(SPECIFICATION))
        for name, path in TEST.findall(row["tests"])
    ]


def test_the_specification_has_promises() -> None:
    assert len({words for words, _, _ in promises()}) > 40
    rows = [line for line in text_of(SPECIFICATION).splitlines() if line.startswith("| ") and "enforced by" not in line]
    assert len(rows) == len({words for words, _, _ in promises()}), "a row names no test, or two rows are the same"


@pytest.mark.parametrize(("words", "name", "path"), promises())
def test_the_test_of_a_promise_exists(words: str, name: str, path: str) -> None:
    found = re.search(rf"\b(?:def|fn) {name}\(", text_of(Path(path)))
    assert found, f"{path} has no test {name}, which {SPECIFICATION} names for: {words}"


@pytest.mark.parametrize("path", DECISIONS, ids=str)
def test_a_decision_has_every_part_and_is_listed(path: Path) -> None:
    text = text_of(path)
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert parts == ["Context", "Decision", "Figures", "Consequences", "Rejected"]
    title = re.match(r"# (\d{4})\. (.+)", text)
    assert title and path.name.startswith(title[1])
    assert f"| [{title[1]}]({path.name}) | {title[2]} |" in text_of(path.parent / "README.md")


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("path", EXPLANATIONS, ids=str)
def test_an_explanation_is_short(path: Path) -> None:
    assert len(text_of(path).splitlines()) <= 150


def test_the_thread_model_is_a_page_without_figures() -> None:
    text = text_of(Path("docs/explanation/thread-model.md"))
    assert len(text.splitlines()) <= 60
    assert not re.search(r"\d (?:µs|ms|GiB|%)", text)


def test_the_architecture_names_every_folder_of_code() -> None:
    inside = {Path("src/vmferry"), Path("pager/src")}
    folders = {Path(path.parts[0]) for path in tracked() if len(path.parts) > 1} - {Path(".github"), Path(".ci")}
    code = [path for path in tracked() if path.name != "tests.rs"]
    folders |= {place for path in code for place in path.parents if place.parent in inside}
    named = text_of(Path("docs/explanation/architecture.md"))
    assert [folder for folder in sorted(folders) if f"`{folder}/" not in named] == []


def test_the_architecture_has_the_import_layers() -> None:
    settings = tomllib.loads(text_of(Path("pyproject.toml")))["tool"]["importlinter"]["contracts"]
    layers = "\n".join(settings[0]["layers"])
    assert f"```text\n{layers}\n```" in text_of(Path("docs/explanation/architecture.md"))


def test_development_names_every_target_of_make() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", text_of(Path("Makefile")), re.MULTILINE)
    named = text_of(Path("docs/contributing/development.md"))
    assert [target for target in targets if f"`make {target}`" not in named] == []


EVENT = re.compile(r"`((?:daemon|migration|incoming|pager|lane|thread|processors|vmm)\.(?!proto`)[a-z_]{4,})`")
"""An event of a log, as the guides to debugging name it; `pager.log` is a file."""


@pytest.mark.parametrize("path", [path for path in ending(".md") if path.name.startswith("debug-a-")], ids=str)
def test_the_events_that_a_guide_names_are_logged(path: Path) -> None:
    code = "\n".join(text_of(one) for one in ending(".py", ".rs") if one.parts[0] in ("src", "pager"))
    named = set(EVENT.findall(text_of(path)))
    assert named
    assert sorted(event for event in named if f'"{event}"' not in code) == []


SHORT = {
    "first touch of a busy guest, p50": "first touch → resumed, p50, to QEMU",
    "first touch of a busy guest, p99": "first touch → resumed, p99, to QEMU",
    "first touch with a limited push, p50": "first touch → resumed, p50, to QEMU, push limited to 256 MiB/s",
    "push, busy guest": "throughput to the last page, guest random, to QEMU",
    "push, idle guest": "throughput to the last page, guest idle, to QEMU",
    "time blocked, busy guest": "guest blocked time, to QEMU",
    "CPU time, busy guest": "CPU seconds a GiB, both ends, guest random, to QEMU",
    "CPU time, idle guest": "CPU seconds a GiB, both ends, guest idle, to QEMU",
    "last instruction on the source to first on the destination": "stop → first instruction, to QEMU",
}
"""Rows of the short table of the results, and the goals that they are taken from."""


@pytest.mark.parametrize(("row", "goal"), SHORT.items())
def test_the_short_table_has_the_figures_of_the_goals(row: str, goal: str) -> None:
    text = text_of(Path("docs/performance/results.md"))
    (cells,) = re.findall(rf"^\| {re.escape(row)} \| (.+) \| (.+) \|$", text, re.MULTILINE)
    for backing, cell in zip(("memfd", "anonymous"), cells, strict=True):
        (value,) = re.findall(rf"^\| {backing}: {re.escape(goal)} \| [^|]+ \| ([\d.]+) \|", text, re.MULTILINE)
        shown = re.search(r"\d+(?:\.(\d+))?", cell)
        assert shown
        expected = 1 / float(value) if "sooner" in cell else float(value)
        assert abs(float(shown[0]) - expected) <= 0.51 * 10.0 ** -len(shown[1] or ""), (row, backing, cell, expected)


def test_every_document_is_reached_from_the_index() -> None:
    pages = {path for path in ending(".md") if path.is_relative_to("docs")}
    reached = {Path("docs/index.md")}
    while True:
        linked = {
            Path(*_normal(page.parent, target))
            for page in reached
            for target in re.findall(r"\]\(([^)#:]+\.md)", text_of(page))
        }
        more = (linked & pages) - reached
        if not more:
            break
        reached |= more
    assert not pages - reached


def _normal(folder: Path, target: str) -> tuple[str, ...]:
    return (ROOT / folder / target).resolve().relative_to(ROOT).parts


def test_every_fragment_of_the_changelog_has_a_known_kind() -> None:
    kinds = [kind["directory"] for kind in tomllib.loads(text_of(Path("pyproject.toml")))["tool"]["towncrier"]["type"]]
    fragments = [path.name for path in tracked() if path.parent == Path("changes") and path.name != "README.md"]
    wrong = [name for name in fragments if not re.fullmatch(rf"[\w-]+\.({'|'.join(kinds)})\.md", name)]
    assert not wrong, f"a fragment is named NAME.KIND.md, KIND one of {kinds}"
