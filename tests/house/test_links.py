"""Every relative link of a document leads to a file of the tree, and its anchor to a heading there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.house.files import ending, exists, text_of, tracked
from tests.support.house.markdown import anchor, anchors, links

PAGES = ending(".md")
NAMED = re.compile(r"\b(?:docs|src/vmferry|pager/src|refvm/src|proto|configs|deploy|bench|tests)/[\w./*-]*\w/?")
"""A path from the root, as comments and documents name one."""
GENERATED = ("src/vmferry/v1",)


def broken(page: Path) -> list[str]:
    """Each link that leads nowhere, and why."""
    found = []
    for link in links(text_of(page)):
        parts = urlsplit(link.target)
        if parts.scheme or parts.netloc:
            continue
        target = Path(os.path.normpath(page.parent / unquote(parts.path))) if parts.path else page
        if not exists(target):
            found.append(f"{page}:{link.line}: {link.target}: no such file: {target}")
        elif parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(text_of(target)):
            found.append(f"{page}:{link.line}: {link.target}: {target} has no heading #{parts.fragment}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


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


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("Who talks to whom", "who-talks-to-whom"),
        ("VMM → daemon: `hello` (first)", "vmm--daemon-hello-first"),
        ("migrations.proto", "migrationsproto"),
        ("8. Performance", "8-performance"),
    ],
)
def test_anchors_are_those_of_github(heading: str, name: str) -> None:
    assert anchor(heading.replace("`", "")) == name
