"""Dirty tracking without the VMM's help (Linux 6.7)."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("uffd_poison")


@pytest.mark.parametrize("backing", ["anon", "shmem"])
def test_scan_returns_exactly_the_pages_written_since_the_last(ask: Any, backing: str) -> None:
    answers = ask("dirty", "written-since-last-scan", backing)
    assert (answers["nothing"], answers["written"], answers["after"]) == ("", "3,17,18", "")
