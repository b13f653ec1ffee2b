"""The ledger as it is kept in memory: never other than what is durable."""

from __future__ import annotations

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.testing.script import Script
from vmferry.testing.store import MemoryStore
from vmferry.units import Gpa

ONE = LedgerEntry(Gpa(0x1000), Origin.VMM, first_seen_us=1, last_seen_us=1)
TWO = LedgerEntry(Gpa(0x2000), Origin.READ, first_seen_us=2, last_seen_us=2)


async def test_a_known_error_is_not_written_again() -> None:
    script = Script()
    errors = LedgerRecorder(MemoryStore(script))
    assert list(await errors.ledger("web")) == []
    assert list(await errors.record("web", [TWO, ONE])) == [TWO, ONE]
    assert list(await errors.record("web", [ONE])) == []
    assert list(await errors.ledger("web")) == [ONE, TWO]
    assert script.transcript == ["store.errors"]


@pytest.mark.parametrize("after", [False, True])
async def test_a_write_that_failed_is_looked_up(after: bool) -> None:
    script = Script()
    store = MemoryStore(script)
    errors = LedgerRecorder(store)
    await errors.ledger("web")
    script.fail_at("store.errors", VmferryError(Reason.STORE_FAILED, "disk full."), after=after)
    with pytest.raises(VmferryError):
        await errors.record("web", [ONE])
    assert list(await errors.ledger("web")) == list(await store.ledger("web")) == ([ONE] if after else [])


async def test_a_replaced_page_is_no_error_and_stays_known() -> None:
    errors = LedgerRecorder(MemoryStore(Script()))
    await errors.record("web", [ONE, TWO])
    await errors.record_replaced("web", [(ONE.gpa, 12), (0x7000, 12)])
    assert list(await errors.ledger("web")) == [TWO]
    assert await errors.count("web") == 1
    assert [entry.replaced for entry in await errors.whole_ledger("web")] == [True, False]
    assert await errors.take("web", [ONE]) == (), "the ledger of a host that has not heard of it"
    await errors.record("web", [ONE])
    assert [entry.gpa for entry in await errors.ledger("web")] == [ONE.gpa, TWO.gpa]
