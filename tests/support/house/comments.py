"""The prose of a source file: its comments and docstrings, as paragraphs. Code in them is left out."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.house import markdown

_RUST = re.compile(r"^\s*//[/!]?\s?(?P<text>.*)$")
_PROTO = re.compile(r"^\s*//\s?(?P<text>.*)$")
_HASH = re.compile(r"^\s*#(?!!)\s?(?P<text>.*)$")


def prose(path: Path, text: str) -> Iterator[str]:
    """The paragraphs of a file, by its suffix.

    Raises:
        ValueError: a suffix that no gate reads.
    """
    match path.suffix:
        case ".md":
            blocks: Iterator[str] = iter([text])
        case ".py":
            blocks = _python(text)
        case ".rs":
            blocks = _blocks(text, _RUST)
        case ".proto":
            blocks = (_with_code(block) for block in _blocks(text, _PROTO))
        case ".toml":
            blocks = _blocks(text, _HASH)
        case _:
            raise ValueError(f"{path}: no prose is known in {path.suffix}; known: .md .py .rs .proto .toml")
    for block in blocks:
        yield from markdown.paragraphs(block)


def _python(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield _without_sections(node.value.value)
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(
            ("# noqa", "# ruff:", "# type:", "#!", "# fmt")
        ):
            comments.append((token.start[0], token.string.removeprefix("#").strip()))
    yield from _runs(comments)


def _without_sections(docstring: str) -> str:
    """`Raises:` is a heading; each entry under it is a paragraph, not a code block."""
    lines = docstring.expandtabs().splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()), default=0)
    body = [lines[0], *(line[margin:] for line in lines[1:])] if lines else []
    out: list[str] = []
    section = False
    for line in body:
        if re.fullmatch(r"(Raises|Returns|Args|Yields):", line.strip()):
            section = True
            continue
        if section and line.startswith("    "):
            out += ["", line.strip()] if ": " in line else [line.strip()]
        else:
            section = section and not line.strip()
            out.append(line)
    return "\n".join(out)


def _blocks(text: str, comment: re.Pattern[str]) -> Iterator[str]:
    found = ((number, match["text"]) for number, line in enumerate(text.splitlines()) if (match := comment.match(line)))
    yield from _runs(list(found))


def _with_code(comment: str) -> str:
    """An indented line of a comment is code for the API reference, and so for the gate."""
    return re.sub(r"(?m)^  ", "      ", comment)


def _runs(lines: list[tuple[int, str]]) -> Iterator[str]:
    """Comments on lines that follow each other are one text."""
    run: list[str] = []
    last = -2
    for number, line in lines:
        if number != last + 1 and run:
            yield "\n".join(run)
            run = []
        run.append(line)
        last = number
    if run:
        yield "\n".join(run)
