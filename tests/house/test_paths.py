"""Every path of the tree that a document names exists, and so does every document that code names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.house.files import ending, exists, text_of, tracked

PAGES = ending(".md")
NAMED = re.compile(r"\b(?:docs|src/vmferry|pager/src|refvm/src|proto|configs|deploy|bench|tests)/[\w./*-]*\w/?")
"""A path from the root, as comments and documents name one."""
GENERATED = ("src/vmferry/v1",)


def missing(page: Path) -> list[str]:
    """Each path that a text names and the tree has not."""
    named = {match.rstrip("./") for match in NAMED.findall(text_of(page)) if "*" not in match}
    return [name for name in sorted(named) if not name.startswith(GENERATED) and not exists(Path(name))]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_paths_that_a_document_names_exist(page: Path) -> None:
    assert not missing(page)


def test_documents_that_code_names_exist() -> None:
    known = {str(path) for path in tracked()}
    named = re.compile(r"\bdocs/[\w/-]+\.md\b")
    wrong = [
        f"{path}: {name}"
        for path in ending(".py", ".rs", ".proto", ".toml", ".c", ".service")
        if not path.is_relative_to("tests/house")
        for name in named.findall(text_of(path))
        if name not in known
    ]
    assert not wrong
