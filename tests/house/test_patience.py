"""Each deadline of a Python test is multiplied by `VMFERRY_PATIENCE`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.house.files import ending, text_of

BEFORE = [
    r"asyncio\.timeout\(",
    r"settimeout\(",
    r"wait_for\(.+, ",
    r"\btimeout=",
    r"\b\w*(?:DEADLINE|PATIENCE|SOON)_S = ",
]
DEADLINE = re.compile(rf"(?:{'|'.join(BEFORE)})(\d+(?:\.\d+)?)")
SHORT_S = 2.0
"""Below this a test means its deadline to pass."""
TESTS = [path for path in ending(".py") if path.is_relative_to("tests")]


def bare(text: str) -> list[str]:
    """Deadlines that are the same on every machine."""
    return [found[0] for found in DEADLINE.finditer(text) if float(found[1]) >= SHORT_S]


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_deadlines_are_patient(path: Path) -> None:
    assert not bare(text_of(path)), "write patient(SECONDS), from vmferry.demo.patience"


@pytest.mark.parametrize("path", [path for path in TESTS if path.name != "conftest.py"], ids=str)
def test_no_limit_of_a_test_is_multiplied_twice(path: Path) -> None:
    assert "mark.timeout(" + "patient" not in text_of(path), "conftest.py multiplies the limit of every test"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("async with asyncio.timeout" + "(20):", 1),
        ("async with asyncio.timeout(patient(20)):", 0),
        ("async with asyncio.timeout(0.3):", 0),
        ("connection.settimeout" + "(10)", 1),
        ("run(command, check=False, timeout=" + "60)", 1),
        ("await asyncio.wait_for(gone.wait(), " + "30)", 1),
        ("READY_DEADLINE_S = " + "5.0", 1),
    ],
)
def test_a_bare_deadline_is_found(text: str, count: int) -> None:
    assert len(bare(text)) == count
