"""A reset of the guest: its VMM puts fresh memory in the place of bad pages, and vmferry forgets those alone."""

from __future__ import annotations

from tests.support.moves import come
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Phase
from vmferry.model.pager import PagesReplaced
from vmferry.testing.host import Pair
from vmferry.testing.pager import FakePager
from vmferry.units import Gpa

ONE, TWO = LedgerEntry(Gpa(0x1000), Origin.VMM), LedgerEntry(Gpa(0x2000), Origin.VMM)


async def moved(pair: Pair) -> FakePager:
    """The pager that guards both errors after the move."""
    await pair.service.record_vmm_errors("web", [ONE, TWO])
    await pair.service.create("m1", "web", "b")
    assert (await pair.a.job_where("m1")).phase is Phase.COMPLETED
    return pair.b.pagers.running["m1-destination"]


async def ledger_on_b(pair: Pair) -> list[int]:
    assert pair.b.service is not None
    return [entry.gpa for entry in await pair.b.service.ledger("web")]


async def test_a_page_that_was_replaced_is_forgotten_and_the_other_stays(pair: Pair) -> None:
    pager = await moved(pair)
    assert pair.b.service is not None
    pager.replaced = {0x1000}
    await pair.b.service.guest_was_reset("web")
    await come(lambda: not pager.kept_events)
    assert await ledger_on_b(pair) == [0x2000]
    assert not pager.ended


async def test_a_reset_of_another_guest_forgets_nothing(pair: Pair) -> None:
    pager = await moved(pair)
    assert pair.b.service is not None
    pager.replaced = {0x1000, 0x2000}
    await pair.b.service.guest_was_reset("db")
    assert await ledger_on_b(pair) == [0x1000, 0x2000]
    assert set(pager.poisoned) == {0x1000, 0x2000}


async def test_a_guard_ends_with_its_last_page(pair: Pair) -> None:
    pager = await moved(pair)
    assert pair.b.service is not None
    pager.replaced = {0x1000, 0x2000}
    await pair.b.service.guest_was_reset("web")
    await come(lambda: pager.ended)
    assert await ledger_on_b(pair) == []


async def test_a_daemon_that_dies_before_it_has_recorded_the_reset_records_it_later(pair: Pair) -> None:
    pager = await moved(pair)
    await pair.b.kill()
    del pager.poisoned[0x1000]
    pager.emit(PagesReplaced(((0x1000, 12),)))
    await pair.b.start()
    await come(lambda: not pager.kept_events)
    assert await ledger_on_b(pair) == [0x2000]
