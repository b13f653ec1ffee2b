"""A pager's events and status, as the daemon reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import PageProgress


@dataclass(frozen=True, slots=True)
class MemoryErrorFound:
    """The pager resolved a page as poison. `reported`: the VMM was told by this pager."""

    error: LedgerEntry
    hva: int
    thread: int
    reported: bool


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """`up` False: faults wait, `reason` says why."""

    up: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AllPresent:
    """The last absent page has arrived."""


@dataclass(frozen=True, slots=True)
class MemoryAttached:
    vmm_pid: int


@dataclass(frozen=True, slots=True)
class MemoryDetached:
    """The VMM's memory connection closed: the VMM died."""

    reason: str


@dataclass(frozen=True, slots=True)
class PagerFailedEvent:
    reason: str


PagerEventBody: TypeAlias = (
    MemoryErrorFound | LinkChanged | AllPresent | MemoryAttached | MemoryDetached | PagerFailedEvent
)


@dataclass(frozen=True, slots=True)
class PagerEvent:
    number: int
    at_us: int
    body: PagerEventBody


@dataclass(frozen=True, slots=True)
class PagerStatus:
    """`PagerStatus` in pager.proto, as far as the daemon decides by it."""

    pid: int
    memory_attached: bool
    memory_reason: str
    link_up: bool
    link_reason: str
    all_present: bool
    progress: PageProgress
