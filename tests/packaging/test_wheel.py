"""A wheel holds all that an installation needs: the package with generated code and data files, and five programs."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.demo.patience import patient

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "vmferry"
BUILD_LIMIT_S = 900


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from what `make setup` compiled, so only packing is left."""
    out = tmp_path_factory.mktemp("wheel")
    maturin = Path(sys.executable).parent / "maturin"
    command = [maturin, "build", "--release", "--locked", "--out", out]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=patient(BUILD_LIMIT_S), check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.mark.timeout(BUILD_LIMIT_S)
def test_package_in_the_wheel_is_the_package_in_the_tree(wheel: zipfile.ZipFile) -> None:
    in_tree = {
        path.relative_to(ROOT / "src").as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {name for name in wheel.namelist() if name.startswith("vmferry/")}
    assert in_wheel == in_tree
    assert "vmferry/v1/pages_pb2_grpc.py" in in_wheel


@pytest.mark.timeout(BUILD_LIMIT_S)
@pytest.mark.parametrize(
    ("program", "magic"),
    [
        ("vmferry-pager", b"\x7fELF"),
        ("vmferry-reach", b"\x7fELF"),
        ("vmferry-refvm", b"\x7fELF"),
        ("vmferry", b"#!python"),
        ("vmferryd", b"#!python"),
    ],
)
def test_program_is_in_the_wheel_and_executable(wheel: zipfile.ZipFile, program: str, magic: bytes) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(f".data/scripts/{program}")]
    assert wheel.read(name).startswith(magic)
    assert wheel.getinfo(name).external_attr >> 16 & stat.S_IXUSR


@pytest.mark.timeout(BUILD_LIMIT_S)
def test_installed_wheel_runs_its_own_programs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Installed away from the source tree, the package imports from there and the programs start."""
    assert wheel.filename is not None
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path]
    subprocess.run([*pip, wheel.filename], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import vmferry.v1.pages_pb2 as m; print(m.__file__)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path))
    helped = subprocess.run([tmp_path / "bin" / "vmferry-pager", "--help"], capture_output=True, text=True, check=True)
    assert "--runtime-dir" in helped.stdout
