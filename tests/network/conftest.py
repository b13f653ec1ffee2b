"""What every network test needs: the emulator, and a place for figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.network.emulator import compile_emulator
from tests.support.network.figures import Figures

TUN = Path("/dev/net/tun")


@pytest.fixture(scope="session")
def emulator_program(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator, compiled; skips where this user may make no TUN device."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"no network of our own can be made: {TUN}: {error.strerror}")
    return compile_emulator(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    made = Figures()
    yield made
    made.write()
