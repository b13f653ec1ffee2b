"""Journal entries on a full disk: a real one, and the file that has room for them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.store.spare_journal import SLOT_BYTES, SLOTS, SpareJournal
from vmferry.store.sqlite import SqliteStore, open_store
from vmferry.units import Gpa


def entry(migration: str, kind: str, **data: object) -> JournalEntry:
    return JournalEntry(migration, kind, 7, data)


class Disk:
    """A small file system, and a file that fills it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(bytes(4096))

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"no file system can be mounted: {mount.stderr.decode().strip()}")
    yield Disk(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def use_up(store: SqliteStore) -> None:
    """Writes until the database has no space for a journal entry either."""
    with pytest.raises(VmferryError, match="full") as caught:
        for number in range(100_000):
            await store.record_errors("filler", [LedgerEntry(Gpa(number << 12), Origin.VMM)])
    assert caught.value.reason is Reason.STORE_FAILED
    for number in range(10_000):
        await store.append_journal(entry(f"filler-{number}", "refused"))
        if spared(store):
            return
    raise AssertionError("the disk is not full")


def spared(store: SqliteStore) -> list[str]:
    assert store._spare is not None
    return [one.kind for one in store._spare.entries]


async def test_a_reserved_entry_is_durable_on_a_disk_that_filled_up_after(disk: Disk) -> None:
    path = disk.path / "vmferry.db"
    store = await open_store(path)
    await store.append_journal(entry("m1", "prepared", vmm_pid=5))
    await store.reserve("m1-destination")
    disk.fill()
    await use_up(store)
    await store.append_journal(entry("m1", "running"))
    assert spared(store) == ["refused", "running"]
    assert [one.kind for one in await store.journal("m1")] == ["prepared", "running"]
    with pytest.raises(VmferryError, match="full"):
        await store.reserve("m2-destination")
    await store.close()
    disk.free()
    again = await open_store(path)
    assert [one.kind for one in await again.journal("m1")] == ["prepared", "running"]
    await again.append_journal(entry("m1", "completed"))
    assert [one.kind for one in await again.journal("m1")] == ["prepared", "running", "completed"]
    assert spared(again) == []
    await again.close()
    assert SpareJournal(path.with_name("vmferry.db-spare")).entries == ()


async def test_slots_that_are_promised_to_stopped_vms_are_not_given_away(disk: Disk) -> None:
    store = await open_store(disk.path / "vmferry.db")
    await store.reserve("m1-destination")
    disk.fill()
    await use_up(store)
    with pytest.raises(VmferryError, match="full"):
        for number in range(SLOTS):
            await store.append_journal(entry(f"stranger-{number}", "refused"))
    assert len(spared(store)) == SLOTS - 1
    await store.append_journal(entry("m1", "running"))
    assert [one.kind for one in await store.journal("m1")] == ["running"]
    await store.close()


async def test_nothing_is_spared_while_the_disk_has_space(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "vmferry.db")
    await store.reserve("m1-source")
    await store.append_journal(entry("m1", "begin"))
    await store.close()
    assert SpareJournal(tmp_path / "vmferry.db-spare").entries == ()


def test_entries_come_back_in_order_and_a_torn_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "spare"
    spare = SpareJournal(path)
    assert path.stat().st_blocks * 512 >= SLOTS * SLOT_BYTES
    entries = [entry(f"m{number}", "refused", reason="ü") for number in range(3)]
    assert all(spare.append(one) for one in entries)
    spare.close()
    with path.open("r+b") as file:
        file.seek(2 * SLOT_BYTES + 20)
        file.write(b"\xff")
    assert SpareJournal(path).entries == tuple(entries[:2])


def test_an_entry_that_fits_no_slot_is_not_taken(tmp_path: Path) -> None:
    spare = SpareJournal(tmp_path / "spare")
    assert not spare.append(entry("m1", "refused", reason="x" * SLOT_BYTES))
    assert all(spare.append(entry("m1", "refused")) for _ in range(SLOTS))
    assert (spare.free, spare.append(entry("m1", "running"))) == (0, False)
    spare.clear()
    spare.close()
    again = SpareJournal(tmp_path / "spare")
    assert (again.entries, again.free) == ((), SLOTS)
    assert (tmp_path / "spare").stat().st_size == SLOTS * SLOT_BYTES
