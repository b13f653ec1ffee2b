"""Whether the move was right: decided from the evidence alone, without I/O. The guest is the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vmferry.demo.admin import GuestReport

COMPLETED = "COMPLETED"
NAMED = 8
"""Addresses that a problem names."""


@dataclass(frozen=True, slots=True)
class LedgerPage:
    """A memory error as the destination's daemon knows it."""

    gpa: int
    guest_visible: bool


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen. GPAs are of the pages' first bytes."""

    phase: str
    reason: str
    poisoned_before: frozenset[int]
    """Bad before the migration was asked for."""
    poisoned_during: frozenset[int]
    """Turned bad on the source while postcopy ran: healed where the good copy had arrived already."""
    at_source: GuestReport
    """The last that the guest said on the source."""
    at_arrival: GuestReport
    """The first that the guest said on the destination after the migration was over."""
    at_end: GuestReport
    """The last that the guest said."""
    ledger: tuple[LedgerPage, ...]
    poison_pages: int
    """Pages that came as poison, by the API."""
    pages_total: int
    pages_arrived: int
    source_running: bool
    idle: bool = False
    """The workload touches nothing after its first pass: its touches need not grow."""


def healed(evidence: Evidence) -> frozenset[int]:
    """Pages that turned bad when their good copy was on the destination already: no machine check is due."""
    return evidence.poisoned_during - {check.gpa for check in evidence.at_end.machine_checks}


def problems(evidence: Evidence) -> list[str]:
    """Everything that is wrong; empty if the move was right."""
    if evidence.phase != COMPLETED:  # the rest would only say the same in other words
        return [f"the migration is {evidence.phase}, not COMPLETED: {evidence.reason or 'no reason given'}"]
    return [*_move(evidence), *_memory(evidence), *_machine_checks(evidence), *_ledger(evidence)]


def _move(evidence: Evidence) -> Iterator[str]:
    if evidence.source_running:
        yield "the source VM still runs"
    if evidence.pages_total == 0 or evidence.pages_arrived != evidence.pages_total:
        yield f"{evidence.pages_arrived} of {evidence.pages_total} pages have arrived"
    if evidence.at_arrival.touches < evidence.at_source.touches:
        yield "the guest on the destination has touched less than it had on the source: it is another guest"
    if not evidence.idle and evidence.at_end.touches <= evidence.at_arrival.touches:
        yield f"the guest does not go on: {evidence.at_end.touches} touches and no more"
    if evidence.at_end.state != "running":
        yield f"the destination VM is {evidence.at_end.state or 'unknown'}, not running"


def _memory(evidence: Evidence) -> Iterator[str]:
    report = evidence.at_end
    if report.wrong_bytes:
        pages = ", ".join(f"{gpa:#x}" for gpa in report.wrong_pages)
        yield f"the guest found {report.wrong_bytes} wrong bytes, first in {pages}"
    if report.fatal:
        yield f"the guest died: {report.fatal}"


def _machine_checks(evidence: Evidence) -> Iterator[str]:
    seen = Counter(check.gpa for check in evidence.at_end.machine_checks)
    bad = evidence.poisoned_before | evidence.poisoned_during
    for gpa, count in sorted(seen.items()):
        if gpa not in bad:
            yield f"a machine check at {gpa:#x}, which is not poisoned"
        elif count > 1:
            yield f"{count} machine checks at {gpa:#x}, not one"
    if untold := evidence.poisoned_before - seen.keys():
        yield f"no machine check at {_some(untold)}, poisoned before the migration"


def _some(pages: frozenset[int]) -> str:
    """The first few addresses, and how many more there are."""
    first = ", ".join(f"{gpa:#x}" for gpa in sorted(pages)[:NAMED])
    return first if len(pages) <= NAMED else f"{first} and {len(pages) - NAMED} more"


def _ledger(evidence: Evidence) -> Iterator[str]:
    checked = {check.gpa for check in evidence.at_end.machine_checks}
    known = {page.gpa for page in evidence.ledger}
    bad = evidence.poisoned_before | evidence.poisoned_during
    for gpa in sorted(known - bad):
        yield f"the destination's ledger has {gpa:#x}, which is not poisoned"
    for gpa in sorted(checked - known):
        yield f"the destination's ledger lacks {gpa:#x}, of which the guest was told"
    for gpa in sorted({page.gpa for page in evidence.ledger if page.guest_visible} - checked):
        yield f"the ledger says that the guest was told of {gpa:#x}; it was not"
    if evidence.poison_pages != len(checked):
        yield f"{evidence.poison_pages} pages came as poison, the guest was told of {len(checked)}"
