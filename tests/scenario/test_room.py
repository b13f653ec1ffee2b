"""A destination without room for the guest refuses while the VM runs on its source: real cgroups, real huge pages."""

from __future__ import annotations

import pytest

from tests.support import cgroups, huge_pages
from tests.support.scenario.harness import ended, guest_at_home, two_hosts, unharmed
from vmferry.demo import stage
from vmferry.demo.options import WaitingShape
from vmferry.demo.programs import daemon_command
from vmferry.units import PAGE_2M

pytestmark = pytest.mark.timeout(120)

NEEDED = 24
"""The huge pages of a small guest."""
FILES = ("hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes")


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
async def test_huge_pages_beyond_the_limit_of_the_pagers_cgroup(
    programs, uffd_poison, monkeypatch: pytest.MonkeyPatch, backing: str
) -> None:
    """The pool has them. The kernel would refuse them to the pager, page by page, once the guest runs there."""
    command = daemon_command()
    with huge_pages.reserved(NEEDED), cgroups.limited("hugetlb", FILES, 8 * PAGE_2M) as group:
        monkeypatch.setattr(stage, "daemon_command", lambda: cgroups.inside(group, command))
        async with two_hosts() as pair:
            guest = await guest_at_home(pair, "web")
            await pair.stage.guest("web", pair.away, "process", WaitingShape(backing=backing, page_size=PAGE_2M))
            await pair.home_api.create("m1", "web", pair.away.place.peer)
            last = await ended(pair.home_api, "m1")
            assert last.reason_code == "DESTINATION_NO_MEMORY"
            assert "charged to the daemon and its pagers" in last.reason
            assert f"the cgroup {group} has 16 MiB left of 16 MiB" in last.reason
            await unharmed(pair, guest)
