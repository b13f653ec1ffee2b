"""A pager's events and status, as the daemon reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import PageProgress


@dataclass(frozen=True, slots=True)
class MemoryErrorFound:
    """The pager resolved a page as poison. `reported`: this pager has told the VMM."""

    error: LedgerEntry
    hva: int
    thread: int
    reported: bool


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """The link between the pagers came up or went down. While it is down faults wait, and `reason` tells the cause."""

    up: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PagesReplaced:
    """The VMM has put fresh memory in the place of poisoned pages, because its guest was reset. `pages`: GPA, and log2
    of the size."""

    pages: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class AllPresent:
    """The last absent page has arrived."""


@dataclass(frozen=True, slots=True)
class MemoryAttached:
    """The VMM has handed its memory to the pager."""

    vmm_pid: int


@dataclass(frozen=True, slots=True)
class MemoryDetached:
    """The VMM's memory connection closed: the VMM died."""

    reason: str


@dataclass(frozen=True, slots=True)
class PagerFailedEvent:
    """The pager can no longer resolve faults."""

    reason: str


PagerEventBody: TypeAlias = (
    MemoryErrorFound | PagesReplaced | LinkChanged | AllPresent | MemoryAttached | MemoryDetached | PagerFailedEvent
)


@dataclass(frozen=True, slots=True)
class PagerEvent:
    """An event and its number. The daemon acknowledges events by number."""

    number: int
    at_us: int
    body: PagerEventBody


@dataclass(frozen=True, slots=True)
class PagerStatus:
    """The fields of `PagerStatus` in pager.proto that the daemon decides by."""

    pid: int
    memory_attached: bool
    memory_reason: str
    link_up: bool
    link_reason: str
    all_present: bool
    progress: PageProgress


@dataclass(frozen=True, slots=True)
class PagerHealth:
    """A pager's process, as the host sees it. A dead one keeps its last figures."""

    pid: int
    alive: bool
    exit: str = ""
    """"was killed by SIGKILL", "ended with status 1", or "has ended" of a process that is no child of this daemon."""
    ended_us: int = 0
    cpu_s: float = 0.0
    memory_bytes: int = 0
