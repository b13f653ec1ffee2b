"""Crates have permitted licences and sources, as `deny.toml` says, and each dependency is used."""

from __future__ import annotations

import tomllib

import pytest

from tests.support import ROOT
from tests.support.house.crates import Package, members, packages, permits, unused_in

RULES = tomllib.loads((ROOT / "deny.toml").read_text())
ALLOWED = frozenset(RULES["licenses"]["allow"])
EXCEPTIONS = {rule["crate"]: frozenset(rule["allow"]) for rule in RULES["licenses"]["exceptions"]}
REGISTRIES = {f"registry+{url}" for url in RULES["sources"]["allow-registry"]}


def test_every_crate_has_a_permitted_licence() -> None:
    foreign = [package for package in packages() if package["source"] is not None]
    assert len(foreign) > 100
    wrong = [
        f"{package['name']} {package['version']}: {package['license']}"
        for package in foreign
        if not permits(package["license"] or "none", ALLOWED | EXCEPTIONS.get(package["name"], frozenset()))
    ]
    assert not wrong, "add the licence to deny.toml if it may be used, or drop the crate"


def test_every_exception_is_needed() -> None:
    licences = {package["name"]: package["license"] for package in packages()}
    assert [name for name in EXCEPTIONS if name not in licences or permits(licences[name], ALLOWED)] == []


def test_every_crate_comes_from_a_permitted_registry() -> None:
    assert {package["source"] for package in packages()} - REGISTRIES == {None}


def test_no_version_is_a_wildcard() -> None:
    wrong = [
        f"{package['name']}: {dependency['name']}"
        for package in members()
        for dependency in package["dependencies"]
        if dependency["req"] == "*" and dependency.get("path") is None
    ]
    assert not wrong


@pytest.mark.parametrize("package", members(), ids=lambda package: package["name"])
def test_every_dependency_is_used(package: Package) -> None:
    assert not unused_in(package), "drop it from Cargo.toml"


def test_every_dependency_of_the_workspace_has_a_user() -> None:
    named = set(tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["dependencies"])
    used = {
        dependency["rename"] or dependency["name"] for package in members() for dependency in package["dependencies"]
    }
    assert named - used == set()


@pytest.mark.parametrize(
    ("expression", "permitted"),
    [
        ("MIT", True),
        ("GPL-3.0", False),
        ("MIT OR GPL-3.0", True),
        ("MIT AND GPL-3.0", False),
        ("MIT/Apache-2.0", True),
        ("Apache-2.0 / GPL-3.0", False),
        ("GPL-3.0 OR (MIT AND Zlib)", True),
        ("(GPL-3.0 OR MIT) AND Zlib", True),
        ("(GPL-3.0 OR MIT) AND ISC", False),
        ("Apache-2.0 WITH LLVM-exception OR MIT", True),
        ("Apache-2.0 WITH LLVM-exception", False),
    ],
)
def test_a_licence_expression_is_read(expression: str, permitted: bool) -> None:
    assert permits(expression, frozenset({"MIT", "Zlib"})) is permitted


def test_a_dependency_that_no_file_names_is_found() -> None:
    pager = next(package for package in members() if package["name"] == "vmferry-pager")
    more = {"name": "left-pad", "rename": None}
    assert "left-pad" in unused_in({**pager, "dependencies": [*pager["dependencies"], more]})
