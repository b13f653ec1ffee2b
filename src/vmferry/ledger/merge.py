"""The rules for merging entries of a ledger and for their travel. No rule removes a poisoned page, but one: the VMM
has put fresh memory in its place at a reset of the guest. The entry then stays as `replaced`, so that no other host's
older ledger brings the error back. Pure.

An entry is keyed by its GPA. It may come again for two reasons. The page was found bad once more, at a later time. Or
one report was delivered twice, after a lost answer or a restart before the acknowledgement. The times tell them
apart. Reports with overlapping intervals are one report, so their counts are not added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from vmferry.model.memory_error import LedgerEntry, Severity
from vmferry.units import Gpa

Block: TypeAlias = tuple[int, int]
"""A page: its GPA, and log2 of its size."""


def merge(one: LedgerEntry, other: LedgerEntry) -> LedgerEntry:
    """Merges two entries of one page. It is commutative and idempotent; `guest_visible` is sticky, AR wins over AO.

    Raises: ValueError for entries of different pages.
    """
    if one.gpa != other.gpa:
        raise ValueError(f"entries of different pages: {one.gpa:#x} and {other.gpa:#x}")
    if _epoch(one) != _epoch(other):
        return max(one, other, key=_epoch)
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
        replacements=first.replacements,
        replaced=first.replaced,
    )


def merge_all(ledger: Mapping[Gpa, LedgerEntry], found: Iterable[LedgerEntry]) -> dict[Gpa, LedgerEntry]:
    """Returns only the entries that are new or changed, in their new form."""
    changed: dict[Gpa, LedgerEntry] = {}
    for entry in found:
        known = changed.get(entry.gpa) or ledger.get(entry.gpa)
        merged = entry if known is None else merge(known, entry)
        if merged != known:
            changed[entry.gpa] = merged
    return changed


def sighted(ledger: Mapping[Gpa, LedgerEntry], found: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    """Reports of this host, which know of no replacement: they are of the memory that is there now."""
    return [
        replace(entry, replacements=known.replacements) if (known := ledger.get(entry.gpa)) else entry
        for entry in found
    ]


def replaced(ledger: Mapping[Gpa, LedgerEntry], pages: Collection[Block]) -> list[LedgerEntry]:
    """The entries that end because the VMM has replaced these pages. An error of a block that is larger than the page
    stays: the rest of the block is bad.
    """
    blocks = set(pages)
    sizes = {lsb for _, lsb in blocks}
    return [
        replace(entry, replacements=entry.replacements + 1, replaced=True)
        for entry in ledger.values()
        if not entry.replaced and any(lsb >= entry.lsb and (entry.gpa >> lsb << lsb, lsb) in blocks for lsb in sizes)
    ]


def travel(ledger: Iterable[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """The ledger on arrival at the next host: each error is one migration older."""
    return tuple(replace(entry, hop=entry.hop + 1) for entry in ledger)


def _epoch(entry: LedgerEntry) -> tuple[int, bool]:
    """An error of a page is newer than the replacement of equal number."""
    return entry.replacements, not entry.replaced


def _age(entry: LedgerEntry) -> tuple[int, str]:
    return entry.first_seen_us, entry.origin.value


def _graver(one: Severity | None, other: Severity | None) -> Severity | None:
    if Severity.ACTION_REQUIRED in (one, other):
        return Severity.ACTION_REQUIRED
    return one or other
