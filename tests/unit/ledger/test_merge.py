"""The ledger: once poisoned, never un-poisoned but by fresh memory; a report delivered twice counts once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.ledger.merge import merge, merge_all, replaced, sighted, travel
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.units import Gpa


@st.composite
def entries(draw: st.DrawFn, gpa: int | None = None) -> LedgerEntry:
    first = draw(st.integers(0, 50))
    return LedgerEntry(
        gpa=Gpa(gpa if gpa is not None else draw(st.integers(0, 4)) * 4096),
        origin=draw(st.sampled_from(Origin)),
        lsb=draw(st.sampled_from([12, 21])),
        severity=draw(st.sampled_from([None, *Severity])),
        guest_visible=draw(st.booleans()),
        hop=draw(st.integers(0, 3)),
        count=draw(st.integers(1, 5)),
        first_seen_us=first,
        last_seen_us=first + draw(st.integers(0, 10)),
    )


@given(entries(0), entries(0))
def test_merge_is_commutative_idempotent_and_forgets_nothing(one: LedgerEntry, other: LedgerEntry) -> None:
    merged = merge(one, other)
    assert merged == merge(other, one)
    assert merge(one, one) == one
    assert merge(merged, other) == merged or other.first_seen_us > merged.last_seen_us
    assert merged.guest_visible is (one.guest_visible or other.guest_visible)
    assert merged.count >= max(one.count, other.count)
    assert merged.hop == max(one.hop, other.hop)
    assert merged.first_seen_us == min(one.first_seen_us, other.first_seen_us)
    assert merged.last_seen_us == max(one.last_seen_us, other.last_seen_us)


@given(st.lists(entries(), max_size=20))
def test_no_page_is_ever_dropped(found: list[LedgerEntry]) -> None:
    ledger: dict[Gpa, LedgerEntry] = {}
    for entry in found:
        ledger |= merge_all(ledger, [entry])
    assert ledger.keys() == {entry.gpa for entry in found}
    for gpa, entry in ledger.items():
        assert entry.guest_visible is any(one.guest_visible for one in found if one.gpa == gpa)


@given(st.lists(entries(), max_size=20))
def test_the_same_report_again_changes_nothing(found: list[LedgerEntry]) -> None:
    ledger = merge_all({}, found)
    assert merge_all(ledger, list(ledger.values())) == {}


def test_a_later_report_is_counted() -> None:
    first = LedgerEntry(Gpa(0), Origin.VMM, first_seen_us=1, last_seen_us=1)
    later = LedgerEntry(Gpa(0), Origin.READ, first_seen_us=2, last_seen_us=2)
    assert merge(first, later).count == 2
    assert merge(first, later).origin is Origin.VMM


def test_entries_of_different_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="0x0 and 0x1000"):
        merge(LedgerEntry(Gpa(0), Origin.VMM), LedgerEntry(Gpa(4096), Origin.VMM))


def test_travel_makes_each_error_one_migration_older() -> None:
    assert travel([LedgerEntry(Gpa(0), Origin.VMM, hop=1)]) == (LedgerEntry(Gpa(0), Origin.VMM, hop=2),)


BAD = LedgerEntry(Gpa(0x1000), Origin.VMM, guest_visible=True, first_seen_us=5, last_seen_us=5)


@st.composite
def lives(draw: st.DrawFn) -> LedgerEntry:
    """An entry of one page at some time of its history."""
    times = draw(st.integers(0, 2))
    ended = times > 0 and draw(st.booleans())
    return replace(draw(entries(0x1000)), replacements=times, replaced=ended)


@given(lives(), lives(), lives())
def test_the_latest_memory_counts_in_any_order(one: LedgerEntry, other: LedgerEntry, third: LedgerEntry) -> None:
    assert merge(one, other) == merge(other, one)
    for last in (merge(merge(one, other), third), merge(one, merge(other, third))):
        times = max(entry.replacements for entry in (one, other, third))
        now = [entry for entry in (one, other, third) if entry.replacements == times]
        assert (last.replacements, last.replaced) == (times, all(entry.replaced for entry in now))


def test_an_older_ledger_does_not_bring_a_replaced_page_back() -> None:
    (gone,) = replaced({BAD.gpa: BAD}, [(0x1000, 12)])
    assert gone.replaced
    assert merge_all({BAD.gpa: gone}, [replace(BAD, last_seen_us=99)]) == {}
    assert replaced({BAD.gpa: gone}, [(0x1000, 12)]) == []


def test_fresh_memory_that_goes_bad_is_an_error_of_its_own() -> None:
    (gone,) = replaced({BAD.gpa: BAD}, [(0x1000, 12)])
    (again,) = sighted({BAD.gpa: gone}, [LedgerEntry(Gpa(0x1000), Origin.READ, first_seen_us=1, last_seen_us=1)])
    merged = merge(gone, again)
    assert not merged.replaced and merged.replacements == 1 and not merged.guest_visible


def test_a_bad_block_outlives_the_replacement_of_a_part() -> None:
    block = LedgerEntry(Gpa(0x200000), Origin.VMM, lsb=21)
    assert replaced({block.gpa: block}, [(0x200000, 12)]) == []
    assert len(replaced({block.gpa: block}, [(0x200000, 21)])) == 1
    piece = LedgerEntry(Gpa(0x201000), Origin.VMM)
    assert len(replaced({piece.gpa: piece}, [(0x200000, 21)])) == 1
