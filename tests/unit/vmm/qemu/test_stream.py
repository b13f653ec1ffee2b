"""The stream that vmferry makes and reads: against recordings of real QEMUs, and against bytes that are none."""

from __future__ import annotations

import lzma
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.vmm.qemu import stream
from vmferry.vmm.qemu.stream import PAGE_BYTES, Block, Stream, StreamError

GOLDEN = Path(__file__).parent / "golden"
SAVED = sorted(GOLDEN.glob("*.saved.xz"))
MIGRATED = sorted(GOLDEN.glob("*.migrated.xz"))


def read(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def global_state(state: bytes) -> bytes:
    head = b"\x04" + struct.pack(">I", 3) + stream.GLOBAL_STATE + struct.pack(">II", 0, 1)
    return head + struct.pack(">I", len(state)) + state.ljust(100, b"\0") + b"\x7e" + struct.pack(">I", 3)


DEVICES = global_state(b"running\0")

names = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=40)
pages = st.lists(st.sampled_from([bytes(PAGE_BYTES), b"\x01" * PAGE_BYTES, b"x" + bytes(PAGE_BYTES - 1)]), min_size=1)
blocks = st.lists(st.tuples(names, pages), max_size=5, unique_by=lambda one: one[0]).map(
    lambda found: [Block(name, b"".join(contents)) for name, contents in found]
)


@given(machine=names, blocks=blocks)
def test_encoded_fields_are_decoded(machine: str, blocks: list[Block]) -> None:
    """Also blocks of zeros only: they are listed with their pages."""
    found = stream.decode(stream.encode(machine, blocks, DEVICES))
    assert found == Stream(machine, tuple(blocks), DEVICES)


@given(blocks=blocks, cut=st.integers(0))
def test_a_stream_that_is_cut_short_is_an_error(blocks: list[Block], cut: int) -> None:
    whole = stream.encode("pc-i440fx-7.2", blocks, DEVICES)
    end = len(whole) - 5  # without the description it is a whole stream, too
    part = whole[: cut % (end - 1)]
    if part.endswith(b"\0") and part[: len(part) - 1].endswith(DEVICES[: max(1, len(part) - 60)]):
        return
    try:
        found = stream.decode(part)
    except StreamError:
        return
    assert len(found.devices) < len(DEVICES)  # a cut within the opaque devices: `paused` and QEMU look at those


@given(st.binary(max_size=400))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    for read_it in (stream.decode, stream.devices_of_save, stream.paused):
        for given_bytes in (data, b"QEVM\0\0\0\x03" + data, b"QEVM\0\0\0\x03\x07\0\0\0\x02pc" + data):
            try:
                read_it(given_bytes)
            except StreamError:
                continue


@given(blocks=blocks, at=st.integers(0), value=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused(blocks: list[Block], at: int, value: int) -> None:
    whole = bytearray(stream.encode("pc-i440fx-7.2", blocks, DEVICES))
    whole[at % len(whole)] = value
    with suppress(StreamError):
        stream.decode(bytes(whole))


def test_sizes_of_blocks_are_bounded() -> None:
    """A stream of some hundred bytes must not claim gigabytes."""
    head = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x01" + struct.pack(">I", 1) + b"\x03ram" + struct.pack(">II", 0, 4)
    size = 1 << 40
    claim = struct.pack(">Q", size | 4) + b"\x01a" + struct.pack(">Q", size)
    end = struct.pack(">QBI", 0x10, 0x7E, 1)
    page = b"\x03" + struct.pack(">I", 1) + struct.pack(">Q", 2) + b"\x01a\0"
    with pytest.raises(StreamError, match="bytes of blocks"):
        stream.decode(head + claim + end + page + end)


def test_the_run_state_becomes_paused() -> None:
    patched = stream.paused(DEVICES)
    assert len(patched) == len(DEVICES)
    assert struct.pack(">I", 7) + b"paused\0\0" in patched
    assert stream.paused(patched) == patched


@pytest.mark.parametrize("devices", [b"", b"\x04", DEVICES + DEVICES, global_state(b"postmigrate\0"), DEVICES[:30]])
def test_a_run_state_that_cannot_be_told_is_an_error(devices: bytes) -> None:
    """A guest may write a second "globalstate" into the memory of a device."""
    with pytest.raises(StreamError):
        stream.paused(devices)


@pytest.mark.skipif(not SAVED, reason="no recordings")
@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.name)
def test_a_recorded_save_becomes_a_whole_stream(path: Path) -> None:
    """`xen-save-devices-state` of each version."""
    devices = stream.paused(stream.devices_of_save(read(path)))
    firmware = Block("pc.bios", b"\xea" * (64 * PAGE_BYTES))
    found = stream.decode(stream.encode("pc-i440fx-7.2", [firmware], devices))
    assert found == Stream("pc-i440fx-7.2", (firmware,), devices)
    assert b"\x0bglobalstate" in devices


@pytest.mark.skipif(not MIGRATED, reason="no recordings")
@pytest.mark.parametrize("path", MIGRATED, ids=lambda path: path.name)
def test_a_recorded_migration_is_read_and_made_plain(path: Path) -> None:
    """`migrate` with x-ignore-shared: firmware and tables come, guest RAM does not."""
    found = stream.decode(read(path))
    assert found.capabilities == ("x-ignore-shared",)
    assert found.machine.startswith("pc-i440fx-")
    assert found.ignored == ("ram",)
    contents = {block.name: block.contents for block in found.blocks}
    assert len(contents["pc.bios"]) == 64 << 10
    assert contents["pc.bios"][-16:].startswith(b"\xea")  # the jump at the reset vector
    plain = stream.decode(stream.encode(found.machine, found.blocks, stream.paused(found.devices)))
    assert {block.name: block.contents for block in plain.blocks} == contents
    assert plain.capabilities == ()
    assert b'"devices"' not in plain.devices
    assert len(plain.devices) == len(found.devices)


@pytest.mark.skipif(not MIGRATED, reason="no recordings")
@pytest.mark.parametrize("path", MIGRATED, ids=lambda path: path.name)
def test_devices_are_the_same_by_both_ways(path: Path) -> None:
    """Section numbers and times aside: `xen-save-devices-state` gives what `migrate` gives."""
    migrated = stream.decode(read(path)).devices
    saved = stream.devices_of_save(read(path.with_name(path.name.replace("migrated", "saved"))))
    assert abs(len(migrated) - len(saved)) < PAGE_BYTES
