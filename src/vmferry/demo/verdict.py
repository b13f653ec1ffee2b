"""Whether the move was right: decided from the evidence alone, without I/O. The guest is the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vmferry.demo.admin import GuestReport
from vmferry.units import LSB_4K, PAGE_4K

COMPLETED = "COMPLETED"
NAMED = 8
"""Addresses that a problem names."""


@dataclass(frozen=True, slots=True)
class LedgerPage:
    """A memory error as the destination's daemon knows it."""

    gpa: int
    guest_visible: bool
    lsb: int = LSB_4K

    @property
    def pages(self) -> range:
        """GPAs of the 4 KiB pages that are lost."""
        return range(self.gpa, self.gpa + (1 << self.lsb), PAGE_4K)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen. Bad pages are named by GPA, 4 KiB each: a huge page is many of them."""

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
    destination_page: int = PAGE_4K
    """Bytes of a page of the backing there, the unit of the API's counts; it goes bad as a whole."""

    @property
    def told(self) -> frozenset[int]:
        """GPAs of the 4 KiB pages of which the guest has been told."""
        return frozenset(gpa for check in self.at_end.machine_checks for gpa in check.pages)

    @property
    def may_be_bad(self) -> frozenset[int]:
        """Pages that may be bad now: one of 4 KiB takes the destination's huge page around it along."""
        size = self.destination_page
        starts = {gpa - gpa % size for gpa in self.poisoned_before | self.poisoned_during}
        return frozenset(gpa for start in starts for gpa in range(start, start + size, PAGE_4K))


def healed(evidence: Evidence) -> frozenset[int]:
    """Pages that turned bad when their good copy was on the destination already: no machine check is due."""
    return evidence.poisoned_during - evidence.told


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
    # Two vCPUs may stumble over one huge page at the same time, and both are told; a small page is one vCPU's alone.
    seen = Counter((check.gpa, check.lsb > LSB_4K and check.vcpu) for check in evidence.at_end.machine_checks)
    may_be_bad = evidence.may_be_bad
    for gpa in sorted(
        {check.gpa for check in evidence.at_end.machine_checks if not may_be_bad.issuperset(check.pages)}
    ):
        yield f"a machine check at {gpa:#x}, which is not poisoned"
    for (gpa, _), count in sorted(seen.items()):
        if count > 1:
            yield f"{count} machine checks at {gpa:#x}, not one"
    if untold := evidence.poisoned_before - evidence.told:
        yield f"no machine check at {_some(untold)}, poisoned before the migration"


def _some(pages: frozenset[int]) -> str:
    """The first few addresses, and how many more there are."""
    first = ", ".join(f"{gpa:#x}" for gpa in sorted(pages)[:NAMED])
    return first if len(pages) <= NAMED else f"{first} and {len(pages) - NAMED} more"


def _ledger(evidence: Evidence) -> Iterator[str]:
    told = evidence.told
    known = frozenset(gpa for page in evidence.ledger for gpa in page.pages)
    visible = frozenset(gpa for page in evidence.ledger if page.guest_visible for gpa in page.pages)
    if invented := known - evidence.may_be_bad:
        yield f"the destination's ledger has {_some(invented)}, which is not poisoned"
    if forgotten := told - known:
        yield f"the destination's ledger lacks {_some(forgotten)}, of which the guest was told"
    if untrue := visible - told:
        yield f"the ledger says that the guest was told of {_some(untrue)}; it was not"
    pages = {gpa // evidence.destination_page for gpa in told}
    if evidence.poison_pages != len(pages):
        yield f"{evidence.poison_pages} pages came as poison, the guest was told of {len(pages)}"
