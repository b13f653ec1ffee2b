"""The crates of the workspace and all that they depend on, as cargo tells them."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.support import ROOT

Package = dict[str, Any]
LICENCE_WORD = re.compile(r"[()]|\bAND\b|\bOR\b|/|[\w.+-]+(?: WITH [\w.-]+)?")


@cache
def packages() -> list[Package]:
    """Every package of `Cargo.lock`, from the sources that a build has downloaded."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[Package] = json.loads(run.stdout)["packages"]
    return found


def members() -> list[Package]:
    """The packages of this tree."""
    return [package for package in packages() if package["source"] is None]


def permits(expression: str, allowed: frozenset[str]) -> bool:
    """Whether one alternative of an SPDX expression has allowed licences only; `/` is the old word for OR."""
    words = LICENCE_WORD.findall(expression)

    def alternatives() -> bool:
        value = conjunction()
        while words and words[0] in ("OR", "/"):
            words.pop(0)
            right = conjunction()
            value = value or right
        return value

    def conjunction() -> bool:
        value = atom()
        while words and words[0] == "AND":
            words.pop(0)
            right = atom()
            value = value and right
        return value

    def atom() -> bool:
        word = words.pop(0)
        if word != "(":
            return word in allowed
        value = alternatives()
        assert words.pop(0) == ")", expression
        return value

    permitted = alternatives()
    assert not words, expression
    return permitted


def sources_of(package: Package) -> Iterator[Path]:
    """The Rust files of a package: a folder `src`, or one of tests, or a single file."""
    for target in package["targets"]:
        path = Path(target["src_path"])
        if path.parent.name == "src" or (path.name == "main.rs" and "test" in target["kind"]):
            yield from path.parent.rglob("*.rs")
        else:
            yield path
            yield from (path.parent / "rig").rglob("*.rs")


def unused_in(package: Package) -> list[str]:
    """Dependencies whose name is in no file of the package, but for those that its manifest excuses.

    `package.metadata.cargo-machete.ignored` names dependencies of generated code, as it does for cargo-machete.
    """
    text = "\n".join(path.read_text() for path in sorted(set(sources_of(package))))
    excused = ((package["metadata"] or {}).get("cargo-machete") or {}).get("ignored", [])
    names = {dependency["rename"] or dependency["name"] for dependency in package["dependencies"]}
    return [
        name
        for name in sorted(names - set(excused))
        if not re.search(rf"\b{re.escape(name.replace('-', '_'))}\b", text)
    ]
