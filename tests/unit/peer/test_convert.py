"""What the destination says reaches the source whole."""

from __future__ import annotations

from dataclasses import fields

from vmferry.model.incoming import IncomingUpdate
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Outcome, PageProgress
from vmferry.peer.convert import update_from_pb, update_to_pb
from vmferry.units import Gpa


def test_every_field_of_an_update_travels():
    entry = LedgerEntry(Gpa(0x3000), Origin.READ, count=2, first_seen_us=1, last_seen_us=5)
    update = IncomingUpdate(
        outcome=Outcome.RUNNING,
        progress=PageProgress(total=9, absent=3, poison=1),
        paused_reason="the link is down",
        errors=(entry,),
        lost_reason="the VMM died",
    )
    values = {field.name: getattr(update, field.name) for field in fields(update)}
    assert all(values.values()), "the example leaves a field at its default, which would travel by accident"
    assert update_from_pb(update_to_pb(update)) == update
