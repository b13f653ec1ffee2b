"""docs/reference/cli.md lists the verbs, options and exit codes that the code has."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from vmferry.cli.arguments import VERBS, parser
from vmferry.cli.exit_codes import ExitCode

TEXT = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text()


def _verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in parser({})._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def test_the_documented_verbs_are_those_of_the_program():
    documented = set(re.findall(r"^### `vmferry ([a-z-]+)", TEXT, re.MULTILINE))
    assert documented == set(VERBS) == set(_verbs())


def test_the_documented_exit_codes_are_those_of_the_program():
    documented = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", TEXT, re.MULTILINE)}
    assert documented == {int(code): code.name for code in ExitCode}


def test_every_option_is_documented_in_the_part_of_its_verb():
    parts = dict(re.findall(r"^### `vmferry ([a-z-]+)[^\n]*\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL))
    everywhere = {"--api", "--json", "--output", "--timeout", "--help"}
    for verb, its_parser in _verbs().items():
        options = {o for a in its_parser._actions for o in a.option_strings if o.startswith("--")} - everywhere
        heading = re.search(rf"^### `vmferry {verb}\b([^\n]*)", TEXT, re.MULTILINE)
        assert heading is not None
        documented = set(re.findall(r"--[a-z][a-z-]*", heading[1] + parts[verb])) - everywhere
        assert documented == options, verb
