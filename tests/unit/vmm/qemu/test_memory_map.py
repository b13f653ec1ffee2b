"""Layouts out of what real QEMUs answered (golden/), and out of answers that no QEMU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import Reason, VmferryError
from vmferry.units import GIB, KIB, MIB, PAGE_2M, PAGE_4K, Gpa, Hva
from vmferry.vmm.qemu.memory_map import (
    MappedRun,
    RamBlock,
    backend_block,
    guest_regions,
    host_address,
    mapped_runs,
    ram_blocks,
    region_address,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.mtree"))


def golden(case: str, kind: str) -> str:
    return (GOLDEN / f"{case}.{kind}").read_text()


def layout(case: str, *backends: str) -> list[tuple[str, int, int, int]]:
    """(block, GPA, size, offset) of each region."""
    blocks = ram_blocks(golden(case, "ramblock"))
    guest = [blocks[name] for one in backends if (name := backend_block(one, blocks))]
    return [(r.block, r.gpa, r.size, r.offset) for r in guest_regions(mapped_runs(golden(case, "mtree")), guest)]


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_memory_of_a_pc_is_one_region_in_spite_of_its_roms(version: str) -> None:
    assert layout(f"{version}-pc", "pc.ram") == [("pc.ram", 0, 64 * MIB, 0)]


def test_the_window_of_a_vga_is_part_of_the_memory_around_it() -> None:
    assert layout("7.2-pc-vga", "ram") == [("ram", 0, 128 * MIB, 0)]


def test_memory_above_4_gib_is_a_region_of_its_own() -> None:
    assert layout("7.2-q35-big", "ram") == [("ram", 0, 2 * GIB, 0), ("ram", 4 * GIB, 4 * GIB, 2 * GIB)]


def test_each_numa_node_is_a_region() -> None:
    assert layout("7.2-numa", "n1", "n0") == [("n0", 0, 64 * MIB, 0), ("n1", 64 * MIB, 64 * MIB, 0)]


def test_a_dimm_is_a_region() -> None:
    assert layout("7.2-dimm", "d0", "pc.ram") == [("pc.ram", 0, 128 * MIB, 0), ("d0", 4 * GIB, 128 * MIB, 0)]


def test_a_version_that_tells_addresses_gives_them_for_every_block() -> None:
    assert all(block.hva is None for block in ram_blocks(golden("7.2-pc", "ramblock")).values())
    newer = ram_blocks(golden("10.0-pc", "ramblock"))
    assert newer["pc.bios"] == RamBlock("pc.bios", PAGE_4K, 256 * KIB, 256 * KIB, Hva(0x7F77E4200000))
    assert newer["/rom@etc/acpi/tables"].used == 128 * KIB
    assert newer["/rom@etc/acpi/tables"].total == 2 * MIB


@pytest.mark.parametrize("case", CASES)
def test_every_block_of_every_recording_is_read(case: str) -> None:
    lines = [line for line in golden(case, "ramblock").splitlines()[1:] if line.strip()]
    assert len(ram_blocks(golden(case, "ramblock"))) == len(lines)


def test_huge_pages_are_told() -> None:
    line = "                     ram    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000\n"
    assert ram_blocks(line)["ram"].page_size == PAGE_2M


def test_memory_that_smram_covers_at_its_end_is_the_same_region() -> None:
    """On q35 with SMM the guest does not see the last megabytes below 4 GiB."""
    block = RamBlock("ram", PAGE_4K, 3 * GIB, 3 * GIB, None)
    runs = [
        MappedRun(Gpa(0), 640 * KIB, "ram", 0),
        MappedRun(Gpa(MIB), 2 * GIB - 17 * MIB, "ram", MIB),
        MappedRun(Gpa(4 * GIB), GIB, "ram", 2 * GIB),
    ]
    found = guest_regions(runs, [block])
    assert [(region.gpa, region.size) for region in found] == [(0, 2 * GIB), (4 * GIB, GIB)]


def test_an_address_in_the_middle_gives_the_address_of_the_first_byte() -> None:
    block = RamBlock("ram", PAGE_4K, 4 * MIB, 4 * MIB, None)
    (region,) = guest_regions([MappedRun(Gpa(MIB), 3 * MIB, "ram", MIB)], [block])
    assert (region.gpa, region.size, region.seen) == (0, 4 * MIB, MIB)
    assert region_address(region, Hva(0x7000_0010_0000)) == 0x7000_0000_0000


def test_a_backend_of_an_old_machine_type_is_named_by_its_path() -> None:
    assert backend_block("ram", {"/objects/ram", "pc.bios"}) == "/objects/ram"
    assert backend_block("gone", {"ram"}) is None


def test_memory_that_is_seen_twice_is_refused() -> None:
    block = RamBlock("ram", PAGE_4K, 4 * MIB, 4 * MIB, None)
    runs = [MappedRun(Gpa(0), 4 * MIB, "ram", 0), MappedRun(Gpa(GIB), MIB, "ram", MIB)]
    with pytest.raises(VmferryError) as caught:
        guest_regions(runs, [block])
    assert caught.value.reason is Reason.VMM_REFUSED


@pytest.mark.parametrize(
    "run",
    [
        MappedRun(Gpa(0), 8 * MIB, "ram", 0),
        MappedRun(Gpa(0), MIB, "ram", 8 * MIB),
        MappedRun(Gpa(0), MIB, "ram", MIB),
    ],
)
def test_a_mapping_that_its_block_cannot_have_is_an_error(run: MappedRun) -> None:
    with pytest.raises(VmferryError) as caught:
        guest_regions([run], [RamBlock("ram", PAGE_4K, 4 * MIB, 4 * MIB, None)])
    assert caught.value.reason is Reason.VMM_PROTOCOL


@pytest.mark.parametrize("text", ["", "FlatView #0\n", "unknown command: 'info mtree -f'\n", "\0" * 100])
def test_an_answer_without_a_view_is_an_error(text: str) -> None:
    with pytest.raises(VmferryError):
        mapped_runs(text)
    with pytest.raises(VmferryError):
        ram_blocks(text)


def test_the_address_must_be_one_of_the_block() -> None:
    answer = "Host virtual address for 0x1000 (pc.ram) is 0x7f2f07e01000\r\n"
    assert host_address(answer, "pc.ram") == 0x7F2F07E01000
    for other in ("Memory at address 0x1000 is not RAM\r\n", "", answer):
        with pytest.raises(VmferryError):
            host_address(other, "ram")


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (mapped_runs, ram_blocks):
        try:
            parse(text)
        except VmferryError:
            continue


@given(
    below=st.integers(1, 64).map(lambda n: n * MIB),
    above=st.integers(0, 64).map(lambda n: n * MIB),
    cut=st.lists(st.integers(1, 63), unique=True, max_size=6),
)
def test_whatever_covers_memory_the_regions_are_the_same(below: int, above: int, cut: list[int]) -> None:
    """Holes of a MiB below 4 GiB, as devices make and move them."""
    runs = [MappedRun(Gpa(at), MIB, "ram", at) for at in range(0, below, MIB) if at // MIB not in cut or at == 0]
    if above:
        runs.append(MappedRun(Gpa(4 * GIB), above, "ram", below))
    block = RamBlock("ram", PAGE_4K, below + above, below + above, None)
    found = [(region.gpa, region.size, region.offset) for region in guest_regions(runs, [block])]
    assert found == [(0, below, 0), *([(4 * GIB, above, below)] if above else [])]
