"""Decides from the evidence alone whether the move was right. The guest is the judge. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vmferry.demo.admin import GuestReport
from vmferry.units import LSB_4K, PAGE_4K

COMPLETED = "COMPLETED"
NAMED = 8
"""The most addresses that one problem names."""


@dataclass(frozen=True, slots=True)
class LedgerPage:
    """A memory error in the ledger of the destination's daemon."""

    gpa: int
    guest_visible: bool
    lsb: int = LSB_4K

    @property
    def pages(self) -> range:
        """The GPAs of the lost 4 KiB pages."""
        return range(self.gpa, self.gpa + (1 << self.lsb), PAGE_4K)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of one move. Bad pages are named by GPA, 4 KiB each: a huge page is many of them."""

    phase: str
    reason: str
    poisoned_before: frozenset[int]
    """Pages that were bad before the migration started."""
    poisoned_during: frozenset[int]
    """Pages that turned bad on the source during postcopy. A good copy that had already arrived heals one."""
    at_source: GuestReport
    """The guest's last report on the source."""
    at_arrival: GuestReport
    """The guest's first report on the destination after the end of the migration."""
    at_end: GuestReport
    """The guest's last report."""
    ledger: tuple[LedgerPage, ...]
    poison_pages: int
    """The pages that arrived as poison, counted by the API."""
    pages_total: int
    pages_arrived: int
    source_running: bool
    idle: bool = False
    """The workload touches nothing after its first pass, so its touches need not grow."""
    destination_page: int = PAGE_4K
    """The bytes of a page of the destination's backing. The API counts such pages, and each goes bad as a whole."""

    @property
    def told(self) -> frozenset[int]:
        """The GPAs of the 4 KiB pages that were reported to the guest."""
        return frozenset(gpa for check in self.at_end.machine_checks for gpa in check.pages)

    @property
    def may_be_bad(self) -> frozenset[int]:
        """The pages that may be bad now. A bad 4 KiB page takes the destination's huge page around it with it."""
        size = self.destination_page
        starts = {gpa - gpa % size for gpa in self.poisoned_before | self.poisoned_during}
        return frozenset(gpa for start in starts for gpa in range(start, start + size, PAGE_4K))


def healed(evidence: Evidence) -> frozenset[int]:
    """The pages that turned bad after their good copy had arrived: no machine check is due."""
    return evidence.poisoned_during - evidence.told


def problems(evidence: Evidence) -> list[str]:
    """All faults of the move. None: the move was right."""
    if evidence.phase != COMPLETED:  # The other checks would only repeat this fault.
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
    # Two vCPUs may touch one huge page at the same time, and both get a machine check. A small page belongs to one
    # vCPU.
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
    """The first few addresses, and the number of the others."""
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
