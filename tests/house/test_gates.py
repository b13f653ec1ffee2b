"""Every file passes each gate, or is named in `exempt.toml`; and a named file that passes is taken off that list."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.house import gates
from tests.support.house.files import ROOT
from tests.support.house.gates import EXEMPT, GATES, LENGTH, MARKDOWN, PROSE, Gate, exempt, rumdl

BY_NAME = pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)


@pytest.mark.parametrize("path", PROSE.files(), ids=str)
def test_prose(path: Path) -> None:
    _passes(PROSE, path)


@pytest.mark.parametrize("path", MARKDOWN.files(), ids=str)
def test_markdown(path: Path) -> None:
    _passes(MARKDOWN, path)


@pytest.mark.parametrize("path", LENGTH.files(), ids=str)
def test_length(path: Path) -> None:
    _passes(LENGTH, path)


def _passes(gate: Gate, path: Path) -> None:
    faults = [] if path in exempt(gate) else gate.faults(path)
    assert not faults, "\n".join([f"{path} does not pass the gate {gate.name!r}:", *faults])


@BY_NAME
def test_every_exempt_file_is_still_at_fault(gate: Gate) -> None:
    known = set(gate.files())
    passing = sorted(str(path) for path in exempt(gate) if path not in known or not gate.faults(path))
    assert not passing, f"take them off the list {gate.name!r} of {EXEMPT}: they pass, or are gone"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("```sh\nls\n``` Text behind a fence.\n\n```\nls\n```\n", "MD046"),
        ("[a page](none.md)\n", "MD057"),
        ("[a page](other.md#none)\n", "MD051"),
        ("![a plot](none.svg)\n", "MD057"),
        ("```\nls\n```\n", "MD040"),
        ("word " * 20 + "word\n", "MD013"),
        ("| a | b |\n|---|---|\n| c |\n", "MD056"),
    ],
)
def test_the_markdown_gate_finds(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "other.md").write_text("# Other\n")
    (tmp_path / "page.md").write_text(f"# Page\n\n{text}")
    assert rule in {fault["rule"] for fault in rumdl(tmp_path) if fault["file"] == "page.md"}


def test_tables_and_code_have_no_line_limit(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    row = "word " * 30
    (tmp_path / "page.md").write_text(f"# Page\n\n| {row}| b |\n|---|---|\n| a<br>c | d |\n\n```sh\n{row}\n```\n")
    assert not rumdl(tmp_path)


def test_text_behind_a_closing_fence_leaves_the_block_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "text_of", lambda _: "```sh\nls\n``` Text.\n\n```sh\nls\n```\n")
    (fault,) = MARKDOWN.faults(Path("page.md"))
    assert fault.startswith("1: a fence is inside this block")
