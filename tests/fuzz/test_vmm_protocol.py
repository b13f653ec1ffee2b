"""Whatever bytes a VMM sends: messages or ProtocolError, nothing else, and no more memory than a frame."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.vmm import protocol
from vmferry.vmm.protocol import FrameDecoder, ProtocolError

LIMIT = 4096

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    *("type", "version", "vm", "pid", "platform", "vcpus", "regions", "abilities", "state", "id", "code", "field"),
    *("message", "seq", "gpa", "lsb", "severity", "guest_visible", "thread", "stopped_us", "started_us"),
]
near_messages = st.fixed_dictionaries(
    {"type": st.sampled_from(["hello", "memory_error", "reply", "error", "stop"])},
    optional={name: json_values for name in FIELDS if name != "type"},
)
bodies = (
    st.binary(max_size=LIMIT)
    | json_values.map(json.dumps).map(str.encode)
    | near_messages.map(lambda message: json.dumps(message).encode())
)


@settings(max_examples=500, deadline=None)
@given(bodies)
def test_any_body(body: bytes) -> None:
    try:
        message = protocol.decode_from_vmm(body)
        if isinstance(message, protocol.Hello):
            protocol.identity_of(message)
    except ProtocolError as error:
        assert error.code in {protocol.CODE_BAD_MESSAGE, protocol.CODE_VERSION}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=64) | st.integers(0, 2 * LIMIT).map(lambda n: n.to_bytes(4, "big")), max_size=64))
def test_any_stream_is_kept_within_a_frame(pieces: list[bytes]) -> None:
    decoder = FrameDecoder(LIMIT)
    try:
        for piece in pieces:
            for body in decoder.feed(piece):
                assert len(body) <= LIMIT
            assert len(decoder._buffer) <= LIMIT + protocol.LENGTH_BYTES
    except ProtocolError as error:
        assert "at most" in error.message
