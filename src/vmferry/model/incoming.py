"""The messages between the two daemons about a migration."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Outcome, PageProgress


@dataclass(frozen=True, slots=True)
class IncomingUpdate:
    """What the destination says of a postcopy under way."""

    outcome: Outcome
    progress: PageProgress
    paused_reason: str
    errors: tuple[LedgerEntry, ...]
    lost_reason: str = ""
    """Set when the VM's process died on the destination after it ran there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the destination is to make ready before the VM stands still.

    `lane_address` "ip:port" and `lane_token`: where the source's pager will serve pages; `ledger`: the memory errors
    known so far. `held`: what the source really holds; its memory is there, or the migration refused, before the
    answer.
    """

    vm: str
    layout: MemoryLayout
    vcpus: int
    platform: str
    lane_address: str
    lane_token: str
    ledger: tuple[LedgerEntry, ...] = ()
    held: tuple[PageRange, ...] = ()
