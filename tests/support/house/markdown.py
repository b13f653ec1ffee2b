"""Markdown as the gates need it: prose and fences. Parsed by markdown-it, as CommonMark with tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block: its language, its text, and its first line."""

    language: str
    text: str
    line: int


@cache
def _tokens(text: str) -> list[Token]:
    return _PARSER.parse(_without_front_matter(text))


def _without_front_matter(text: str) -> str:
    """The head of an issue template, between two lines `---`, is no Markdown."""
    return re.sub(r"\A---\n.*?\n---\n", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)


def fences(text: str) -> Iterator[Fence]:
    """Every fenced block, in order."""
    for token in _tokens(text):
        if token.type == "fence":
            yield Fence(token.info.strip(), token.content, (token.map or [0])[0] + 1)


def paragraphs(text: str) -> Iterator[str]:
    """The prose: paragraphs, list items and table cells, without code, headings, links' targets and comments."""
    skipped = False
    for token in _tokens(text):
        if token.type in ("heading_open", "heading_close"):
            skipped = token.type == "heading_open"
        elif token.type == "inline" and not skipped:
            yield _plain(token)


def _plain(inline: Token) -> str:
    parts = {"text": "{}", "code_inline": "`{}`", "softbreak": " ", "hardbreak": " "}
    return "".join(parts.get(child.type, "").format(child.content) for child in inline.children or ())
