"""How entries of a ledger come together, and how they travel. Once poisoned, never un-poisoned: nothing here removes.

An entry is keyed by its GPA. It may come again for two reasons: the page was found bad once more (a later time), or
the same report was delivered twice (a lost answer, a daemon that restarted before it acknowledged). The times tell
them apart: reports whose intervals overlap are the same ones, so their counts are not added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vmferry.model.memory_error import LedgerEntry, Severity
from vmferry.units import Gpa


def merge(one: LedgerEntry, other: LedgerEntry) -> LedgerEntry:
    """Two entries of one page as one. Commutative and idempotent; `guest_visible` is sticky, AR wins over AO.

    Raises: ValueError for entries of different pages.
    """
    if one.gpa != other.gpa:
        raise ValueError(f"entries of different pages: {one.gpa:#x} and {other.gpa:#x}")
    first, later = sorted((one, other), key=_age)
    overlap = later.first_seen_us <= first.last_seen_us
    return LedgerEntry(
        gpa=first.gpa,
        origin=first.origin,
        lsb=max(first.lsb, later.lsb),
        severity=_graver(first.severity, later.severity),
        guest_visible=first.guest_visible or later.guest_visible,
        hop=max(first.hop, later.hop),
        count=max(first.count, later.count) if overlap else first.count + later.count,
        first_seen_us=first.first_seen_us,
        last_seen_us=max(first.last_seen_us, later.last_seen_us),
    )


def merge_all(ledger: Mapping[Gpa, LedgerEntry], found: Iterable[LedgerEntry]) -> dict[Gpa, LedgerEntry]:
    """Only the entries that are new or changed, as they are now."""
    changed: dict[Gpa, LedgerEntry] = {}
    for entry in found:
        known = changed.get(entry.gpa) or ledger.get(entry.gpa)
        merged = entry if known is None else merge(known, entry)
        if merged != known:
            changed[entry.gpa] = merged
    return changed


def travel(ledger: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """The ledger as it arrives on the next host: each error is one migration older."""
    return tuple(replace(entry, hop=entry.hop + 1) for entry in ledger)


def _age(entry: LedgerEntry) -> tuple[int, str]:
    return entry.first_seen_us, entry.origin.value


def _graver(one: Severity | None, other: Severity | None) -> Severity | None:
    if Severity.ACTION_REQUIRED in (one, other):
        return Severity.ACTION_REQUIRED
    return one or other
