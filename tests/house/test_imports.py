"""The import contracts of pyproject.toml hold, and each of them finds a forbidden import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.house.files import ROOT

FORBIDDEN = {
    "ops/server.py": "vmferry.api.server",
    "api/server.py": "vmferry.ops.state",
    "vmm/server.py": "vmferry.migration.service",
    "peer/client.py": "vmferry.store.sqlite",
    "store/queries.py": "vmferry.pager.settings",
    "pager/settings.py": "vmferry.vmm.protocol",
    "migration/inventory.py": "vmferry.pager.client",
    "migration/timeouts.py": "vmferry.migration.source.events",
    "migration/source/events.py": "vmferry.migration.destination.layout",
    "migration/destination/layout.py": "vmferry.migration.source.commands",
    "ledger/merge.py": "vmferry.rpc.convert",
    "ports.py": "vmferry.ledger.merge",
    "model/names.py": "vmferry.ports",
    "aio/backoff.py": "vmferry.errors",
    "units.py": "vmferry.model.names",
    "client/plain.py": "vmferry.testing.clock",
    "model/memory.py": "grpc",
    "rpc/status.py": "sqlalchemy",
    "vmm/session.py": "aiohttp",
}
"""A module, and an import that no contract may let pass there."""

LINE = re.compile(r"(?:-|&)\s+(vmferry[\w.]*) -> ([\w.]+) \(l\.\d+")


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )


def copy(to: Path) -> Path:
    shutil.copytree(ROOT / "src/vmferry", to / "src/vmferry", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def test_the_contracts_hold() -> None:
    run = lint(ROOT)
    assert run.returncode == 0, run.stdout


def test_each_forbidden_import_is_found(tmp_path: Path) -> None:
    tree = copy(tmp_path)
    for module, imported in FORBIDDEN.items():
        with (tree / "src/vmferry" / module).open("a") as file:
            file.write(f"\nimport {imported}\n")
    run = lint(tree)
    assert run.returncode == 1, run.stdout + run.stderr
    found = set(LINE.findall(run.stdout))
    planted = {(f"vmferry.{module.removesuffix('.py').replace('/', '.')}", name) for module, name in FORBIDDEN.items()}
    assert planted <= found, sorted(planted - found)


def test_a_package_in_no_layer_is_found(tmp_path: Path) -> None:
    tree = copy(tmp_path)
    (tree / "src/vmferry/helpers.py").write_text('"""A module that no layer names."""\n')
    run = lint(tree)
    assert run.returncode == 1
    assert "helpers" in run.stdout
