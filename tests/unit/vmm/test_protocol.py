"""Messages survive the wire; malformed ones are refused by the path of their field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.model.memory import Backing, MemoryKind, MemoryLayout, MemoryRegion
from vmferry.model.memory_error import Origin, Severity
from vmferry.model.names import VM_NAME
from vmferry.units import MIB, PAGE_2M, Gpa
from vmferry.vmm import protocol
from vmferry.vmm.protocol import FrameDecoder, FromVmm, ProtocolError, ToVmm

u64 = st.integers(0, 2**64 - 1)
ids = st.integers(0, 2**63 - 1)
backings = st.sampled_from(Backing)
text = st.text(st.characters(exclude_categories=["Cs"]))

from_vmm = st.one_of(
    st.builds(
        protocol.Hello,
        version=st.integers(0, 10),
        vm=st.from_regex(VM_NAME, fullmatch=True),
        pid=st.integers(1, 2**31 - 1),
        platform=text,
        vcpus=st.integers(0, 65_536),
        regions=st.lists(st.builds(protocol.HelloRegion, u64, u64, u64, u64, backings)),
        abilities=st.lists(text),
        state=st.sampled_from(["running", "stopped", "incoming", "prepared", "loaded"]),
        memory=st.builds(protocol.HelloMemory, st.none() | u64, st.none() | backings),
    ),
    st.builds(
        protocol.MemoryErrorReport,
        st.integers(1, 2**63 - 1),
        u64,
        st.integers(0, 63),
        st.none() | st.sampled_from(Severity),
        st.booleans(),
        u64,
    ),
    st.builds(protocol.Reply, ids, st.none() | ids, st.none() | ids, st.none() | st.binary()),
    st.builds(protocol.Refusal, ids, text, text, text),
)
to_vmm = st.one_of(
    st.builds(protocol.Welcome),
    st.builds(protocol.ErrorFrame, text, text, text),
    st.builds(protocol.Recorded, ids),
    st.builds(protocol.AttachMemory, ids, text),
    *[
        st.builds(kind, ids)
        for kind in (
            protocol.Stop,
            protocol.SaveState,
            protocol.Resume,
            protocol.Abandon,
            protocol.Start,
            protocol.Reset,
        )
    ],
    st.builds(
        protocol.Prepare,
        ids,
        st.lists(st.builds(protocol.PrepareRegion, u64, u64, u64, backings)),
        ids,
        st.lists(text),
        text,
    ),
    st.builds(protocol.LoadState, ids, st.binary()),
    st.builds(protocol.MigrationComplete, ids, st.booleans()),
)


@settings(deadline=None)
@given(st.lists(from_vmm), st.integers(1, 64))
def test_messages_of_a_vmm_there_and_back_in_any_pieces(messages: list[FromVmm], piece: int) -> None:
    stream = b"".join(protocol.encode(message) for message in messages)
    decoder = FrameDecoder()
    got = [
        protocol.decode_from_vmm(body)
        for start in range(0, len(stream), piece)
        for body in decoder.feed(stream[start : start + piece])
    ]
    assert got == messages
    assert not decoder.in_frame


@settings(deadline=None)
@given(to_vmm)
def test_messages_of_the_daemon_there_and_back(message: ToVmm) -> None:
    (body,) = FrameDecoder().feed(protocol.encode(message))
    assert protocol.decode_to_vmm(body) == message


HELLO: dict[str, Any] = {
    "type": "hello",
    "version": 1,
    "vm": "web-1",
    "pid": 42,
    "platform": "x86_64/kvm",
    "vcpus": 2,
    "regions": [{"gpa": 0, "hva": 4096, "size": MIB, "page_size": 4096, "backing": "memfd"}],
    "abilities": ["source"],
    "state": "running",
}
ERROR: dict[str, Any] = {"type": "memory_error", "seq": 1, "gpa": 4096, "lsb": 12, "severity": "AR"}


def region(**changes: Any) -> dict[str, Any]:
    return {**HELLO, "regions": [{**HELLO["regions"][0], **changes}]}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "type"),
        ({**HELLO, "type": "hallo"}, "type"),
        ({**HELLO, "type": 1}, "type"),
        ({k: v for k, v in HELLO.items() if k != "pid"}, "pid"),
        ({**HELLO, "pid": "42"}, "pid"),
        ({**HELLO, "pid": 0}, "pid"),
        ({**HELLO, "vm": ""}, "vm"),
        ({**HELLO, "vm": "../etc"}, "vm"),
        ({**HELLO, "vm": "a" * 64}, "vm"),
        ({**HELLO, "vcpus": -1}, "vcpus"),
        ({**HELLO, "state": "asleep"}, "state"),
        ({**HELLO, "regions": {}}, "regions"),
        ({**HELLO, "abilities": [1]}, "abilities[0]"),
        ({**HELLO, "memory": None}, "memory"),
        ({**HELLO, "memory": {"page_size": "2M"}}, "memory.page_size"),
        ({**HELLO, "memory": {"backing": "paper"}}, "memory.backing"),
        (region(gpa=-1), "regions[0].gpa"),
        (region(size=1.5), "regions[0].size"),
        (region(backing="paper"), "regions[0].backing"),
        ({**ERROR, "guest_visible": "yes"}, "guest_visible"),
        ({**ERROR, "guest_visible": True, "severity": "XX"}, "severity"),
        (ERROR, "guest_visible"),
        ({"type": "reply"}, "id"),
        ({"type": "reply", "id": 1, "state": "not base64!"}, "state"),
        ({"type": "error", "code": "FAILED", "message": ""}, "id"),
        ([], ""),
        (1, ""),
    ],
)
def test_malformed_messages_name_the_field(message: Any, field: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_from_vmm(json.dumps(message).encode())
    assert caught.value.field == field
    assert caught.value.code == protocol.CODE_BAD_MESSAGE


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"type": "hello\xff"}', b"nul", b"[" * 100_000, b'{"a":' * 5000]
)
def test_bytes_that_are_no_json_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_from_vmm(body)


def test_unknown_fields_are_ignored() -> None:
    hello = protocol.decode_from_vmm(json.dumps({**HELLO, "colour": "red"}).encode())
    assert isinstance(hello, protocol.Hello)
    assert protocol.identity_of(hello).vm == "web-1"


@pytest.mark.parametrize(
    ("message", "field", "code"),
    [
        ({**HELLO, "version": 2}, "version", "VERSION"),
        ({**HELLO, "regions": []}, "regions", "BAD_MESSAGE"),
        ({**HELLO, "vcpus": 0}, "vcpus", "BAD_MESSAGE"),
        ({**HELLO, "state": "incoming"}, "regions", "BAD_MESSAGE"),
        (region(page_size=512), "regions[0].page_size", "BAD_MESSAGE"),
        ({**HELLO, "memory": {"page_size": 8192}}, "memory.page_size", "BAD_MESSAGE"),
        (region(gpa=512), "regions[0].gpa", "BAD_MESSAGE"),
        (region(size=2**80), "regions[0].size", "BAD_MESSAGE"),
        (region(size=2**64 - 4096, gpa=8192), "regions[0].size", "BAD_MESSAGE"),
    ],
)
def test_hello_that_cannot_be_names_the_field(message: Any, field: str, code: str) -> None:
    hello = protocol.decode_from_vmm(json.dumps(message).encode())
    assert isinstance(hello, protocol.Hello)
    with pytest.raises(ProtocolError) as caught:
        protocol.identity_of(hello)
    assert (caught.value.field, caught.value.code) == (field, code)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({}, MemoryKind()),
        ({"memory": {}}, MemoryKind()),
        ({"memory": {"page_size": PAGE_2M, "later": 1}}, MemoryKind(PAGE_2M)),
        ({"memory": {"page_size": 4096, "backing": "memfd"}}, MemoryKind(4096, Backing.MEMFD)),
    ],
)
def test_a_destination_names_its_backing_of_memory(said: dict[str, Any], meant: MemoryKind) -> None:
    waiting = {**HELLO, "state": "incoming", "regions": [], "vcpus": 0, **said}
    hello = protocol.decode_from_vmm(json.dumps(waiting).encode())
    assert isinstance(hello, protocol.Hello)
    assert protocol.identity_of(hello).memory == meant


LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), MIB, 4096, Backing.MEMFD),))


def report(gpa: int, lsb: int = 12) -> protocol.MemoryErrorReport:
    return protocol.MemoryErrorReport(1, gpa, lsb, Severity.ACTION_REQUIRED, True, 7)


def test_a_report_becomes_an_entry_of_the_pages_first_byte() -> None:
    entry = protocol.entry_of(report(0x5123, lsb=0), LAYOUT, 99)
    assert (entry.gpa, entry.lsb, entry.origin) == (0x5000, 12, Origin.VMM)
    assert (entry.severity, entry.guest_visible) == (Severity.ACTION_REQUIRED, True)
    assert (entry.first_seen_us, entry.last_seen_us, entry.count) == (99, 99, 1)


@pytest.mark.parametrize("gpa", [MIB, 2**64 - 1])
def test_a_report_outside_the_layout_is_refused(gpa: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.entry_of(report(gpa), LAYOUT, 99)
    assert caught.value.field == "gpa"


def test_a_frame_beyond_the_limit_is_refused_before_it_comes() -> None:
    decoder = FrameDecoder(limit=100)
    with pytest.raises(ProtocolError, match="101 bytes"):
        list(decoder.feed((101).to_bytes(4, "big")))
    assert list(FrameDecoder(limit=100).feed((100).to_bytes(4, "big") + b"x" * 100)) == [b"x" * 100]
