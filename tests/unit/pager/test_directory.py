"""The directories of pagers: any key fits into any `runtime_dir` that the configuration admits."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vmferry.errors import VmferryError
from vmferry.model.names import SOCKET_PATH_LIMIT
from vmferry.pager.directory import MEMORY_SOCKET, RUNTIME_DIR_LIMIT, directory_of

LONGEST_KEY = "m" * 63 + "-destination"


def runtime_dir(length: int) -> Path:
    return Path("/" + "r" * (length - 1))


def test_a_key_that_fits_is_the_name() -> None:
    assert directory_of(Path("/run/vmferry"), LONGEST_KEY) == Path("/run/vmferry/vms") / LONGEST_KEY


@pytest.mark.parametrize("length", range(1, RUNTIME_DIR_LIMIT + 1))
def test_the_longest_key_fits_and_is_told_from_another(length: int) -> None:
    found = directory_of(runtime_dir(length), LONGEST_KEY)
    assert len(str(found / MEMORY_SOCKET)) <= SOCKET_PATH_LIMIT
    assert found == directory_of(runtime_dir(length), LONGEST_KEY)
    assert found != directory_of(runtime_dir(length), LONGEST_KEY.replace("destination", "source"))
    assert found.parent == runtime_dir(length) / "vms"


def test_a_longer_runtime_dir_is_refused() -> None:
    with pytest.raises(VmferryError, match=f"at most {RUNTIME_DIR_LIMIT} leave room"):
        directory_of(runtime_dir(RUNTIME_DIR_LIMIT + 1), "m")


def test_the_kernel_binds_the_longest_path(tmp_path: Path) -> None:
    base = tmp_path / ("r" * (RUNTIME_DIR_LIMIT - len(str(tmp_path)) - 1))
    if len(str(base)) != RUNTIME_DIR_LIMIT:
        pytest.skip(f"{tmp_path} is too long for this test")
    directory = directory_of(base, LONGEST_KEY)
    directory.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / MEMORY_SOCKET))
