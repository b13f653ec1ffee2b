"""Markdown as the gates need it: prose, links, anchors, fences. Parsed by markdown-it, as CommonMark with tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True, slots=True)
class Link:
    """A link or an image: its target as written, and the first line of its paragraph."""

    target: str
    line: int


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


def links(text: str) -> Iterator[Link]:
    """Every link and image, in order."""
    for token in _tokens(text):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield Link(str(target), (token.map or [0])[0] + 1)


def anchors(text: str) -> set[str]:
    """The anchor of each heading, as GitHub makes it: a repeated one gets `-1`, `-2`, …"""
    found: dict[str, int] = {}
    tokens = _tokens(text)
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            name = anchor(_plain(inline))
            count = found.get(name, 0)
            found[name] = count + 1
            if count:
                found[f"{name}-{count}"] = 1
    return set(found)


def anchor(heading: str) -> str:
    """Lower case, punctuation dropped, each blank a hyphen."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


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
    return "".join(
        " " if child.type in ("softbreak", "hardbreak") else child.content
        for child in inline.children or ()
        if child.type in ("text", "code_inline", "softbreak", "hardbreak")
    )


def unwrappable(text: str) -> set[int]:
    """Numbers of the lines that cannot be wrapped: in tables, code blocks, HTML, and front matter."""
    lines: set[int] = set()
    for token in _tokens(text):
        if token.type in ("table_open", "fence", "code_block", "html_block") and token.map:
            lines.update(range(token.map[0] + 1, token.map[1] + 1))
    head = len(text.splitlines()) - len(text[len(_front_matter(text)) :].splitlines())
    return lines | set(range(1, head + 1))


def _front_matter(text: str) -> str:
    match = re.match(r"\A---\n.*?\n---\n", text, flags=re.DOTALL)
    return match[0] if match else ""
