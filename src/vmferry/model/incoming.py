"""The messages between the two daemons about a migration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Outcome, PageProgress


@dataclass(frozen=True, slots=True)
class IncomingUpdate:
    """A report of the destination during postcopy."""

    outcome: Outcome
    progress: PageProgress
    paused_reason: str
    errors: tuple[LedgerEntry, ...]
    lost_reason: str = ""
    """Set when the VM's process died on the destination after it ran there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The contents of a Prepare, which the destination does before the blackout.

    `lane_address` ("ip:port") and `lane_token` lead to the source's pager. `ledger` has the memory errors known so far.
    `held` lists the pages that the source really holds: the destination allocates their memory, or refuses.
    """

    vm: str
    layout: MemoryLayout
    vcpus: int
    platform: str
    lane_address: str
    lane_token: str
    ledger: tuple[LedgerEntry, ...] = ()
    held: tuple[PageRange, ...] = ()

    def digest(self) -> str:
        """Tells this request from another of the same migration. Its ledger and held pages may differ."""
        same = (self.vm, self.layout, self.vcpus, self.platform, self.lane_address, self.lane_token)
        return hashlib.sha256(repr(same).encode()).hexdigest()
