"""The control socket's messages and frames (docs/reference/vmm-protocol.md). Pure: bytes in, messages out.

A frame is a 4-byte big-endian length and that many bytes of JSON, an object with a `type`. Unknown fields are ignored.
Any other error raises `ProtocolError`, which names the field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

import msgspec

from vmferry.model.memory import (
    PAGE_SIZES,
    PAGE_SIZES_TEXT,
    Backing,
    MemoryKind,
    MemoryLayout,
    MemoryRegion,
    layout_problem,
)
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.names import VM_NAME
from vmferry.model.vmm import DEVICE_STATE_LIMIT, VmmIdentity
from vmferry.units import LSB_4K, MIB, Gpa

VERSION = 1
FRAME_LIMIT = 88 * MIB
"""A frame holds a device state of `DEVICE_STATE_LIMIT`: base64 makes four bytes of three."""
LENGTH_BYTES = 4

CODE_VERSION = "VERSION"
CODE_BAD_MESSAGE = "BAD_MESSAGE"
CODE_BAD_STATE = "BAD_STATE"
CODE_NO_MEMORY = "NO_MEMORY"


class ProtocolError(Exception):
    """The other end sent a malformed message. An `error` frame says so, and the connection is closed.

    `field` is its path in the message, e.g. `regions[0].size`; it is empty if no field is at fault.
    """

    def __init__(self, field: str, message: str, code: str = CODE_BAD_MESSAGE) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message
        self.code = code


# JSON integers up to 2^64-1. The bound is checked where a value enters the model.
Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
State: TypeAlias = Literal["running", "stopped", "incoming", "prepared", "loaded"]
Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=rf"^{VM_NAME}\Z")]


class HelloRegion(msgspec.Struct, frozen=True):
    """A region in the VMM."""

    gpa: Natural
    hva: Natural
    size: Natural
    page_size: Natural
    backing: Backing


class HelloMemory(msgspec.Struct, frozen=True, omit_defaults=True):
    """The memory that a destination makes. An absent field is as on the source."""

    page_size: Natural | None = None
    backing: Backing | None = None


class Hello(msgspec.Struct, frozen=True, tag="hello", tag_field="type"):
    """The first message of a VMM."""

    version: int
    vm: Name
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    platform: str
    vcpus: Annotated[int, msgspec.Meta(ge=0, le=65_536)]
    regions: list[HelloRegion]
    abilities: list[str]
    state: State
    memory: HelloMemory = HelloMemory()
    state_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0


class MemoryErrorReport(msgspec.Struct, frozen=True, tag="memory_error", tag_field="type"):
    """A page of the guest went bad. `severity` None: the VMM injected no machine check."""

    seq: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    gpa: Natural
    lsb: Annotated[int, msgspec.Meta(ge=0, le=63)]
    severity: Severity | None
    guest_visible: bool
    thread: Natural = 0


class GuestReset(msgspec.Struct, frozen=True, tag="guest_reset", tag_field="type"):
    """The guest was reset, and the VMM has put fresh memory in the place of bad pages."""

    seq: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Reply(msgspec.Struct, frozen=True, tag="reply", tag_field="type"):
    """A request is done. Only the replies to `stop`, `save_state` and `start` carry a value."""

    id: Natural
    stopped_us: int | None = None
    started_us: int | None = None
    state: bytes | None = None


class Refusal(msgspec.Struct, frozen=True, tag="error", tag_field="type"):
    """A request is not done."""

    id: Natural
    code: str
    message: str
    field: str = ""


FromVmm: TypeAlias = Hello | MemoryErrorReport | GuestReset | Reply | Refusal


class Welcome(msgspec.Struct, frozen=True, tag="welcome", tag_field="type"):
    """The answer to `hello`."""

    version: int = VERSION


class ErrorFrame(msgspec.Struct, frozen=True, tag="error", tag_field="type"):
    """The VMM's message was malformed or is refused. The connection is closed after it."""

    code: str
    field: str
    message: str


class Recorded(msgspec.Struct, frozen=True, tag="recorded", tag_field="type"):
    """The memory error with this number is durable, or the reset with this number is known."""

    seq: int


class AttachMemory(msgspec.Struct, frozen=True, tag="attach_memory", tag_field="type"):
    id: int
    socket: str


class Stop(msgspec.Struct, frozen=True, tag="stop", tag_field="type"):
    id: int


class SaveState(msgspec.Struct, frozen=True, tag="save_state", tag_field="type"):
    id: int


class Resume(msgspec.Struct, frozen=True, tag="resume", tag_field="type"):
    id: int


class Abandon(msgspec.Struct, frozen=True, tag="abandon", tag_field="type"):
    id: int


class PrepareRegion(msgspec.Struct, frozen=True):
    """A region for a destination to make."""

    gpa: int
    size: int
    page_size: int
    backing: Backing


class Prepare(msgspec.Struct, frozen=True, tag="prepare", tag_field="type"):
    id: int
    regions: list[PrepareRegion]
    vcpus: int
    uffd_features: list[str]
    socket: str


class LoadState(msgspec.Struct, frozen=True, tag="load_state", tag_field="type"):
    id: int
    state: bytes


class Start(msgspec.Struct, frozen=True, tag="start", tag_field="type"):
    id: int


class MigrationComplete(msgspec.Struct, frozen=True, tag="migration_complete", tag_field="type"):
    id: int
    keep_uffd: bool


class Reset(msgspec.Struct, frozen=True, tag="reset", tag_field="type"):
    id: int


Request: TypeAlias = (
    AttachMemory | Stop | SaveState | Resume | Abandon | Prepare | LoadState | Start | MigrationComplete | Reset
)
ToVmm: TypeAlias = Welcome | ErrorFrame | Recorded | Request

_from_vmm: msgspec.json.Decoder[FromVmm] = msgspec.json.Decoder(FromVmm)
_to_vmm: msgspec.json.Decoder[ToVmm] = msgspec.json.Decoder(ToVmm)
_encoder = msgspec.json.Encoder()


def encode(message: FromVmm | ToVmm) -> bytes:
    """The message as a frame. Raises: ProtocolError if the message is too long for a frame."""
    body = _encoder.encode(message)
    if len(body) > FRAME_LIMIT:
        raise ProtocolError("", f"message of {len(body)} bytes, a frame holds at most {FRAME_LIMIT}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_from_vmm(body: bytes) -> FromVmm:
    """A frame's body as a message of a VMM. Raises: ProtocolError."""
    try:
        return _from_vmm.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from error


def decode_to_vmm(body: bytes) -> ToVmm:
    """The daemon's messages as a VMM reads them, for stand-ins of a VMM. Raises: ProtocolError."""
    try:
        return _to_vmm.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from error


def _malformed(error: Exception) -> ProtocolError:
    """Extracts the field from msgspec's words: "Expected `int`, got `str` - at `$.regions[0].size`"."""
    if not isinstance(error, msgspec.ValidationError):
        return ProtocolError("", f"not JSON: {error}")
    text, _, path = str(error).partition(" - at `")
    field = path.rstrip("`").removeprefix("$").removeprefix(".")
    missing = re.search(r"missing required field `([^`]*)`", text)
    if missing:
        field = f"{field}.{missing[1]}" if field else missing[1]
    return ProtocolError(field, text)


class FrameDecoder:
    """Takes bytes as they arrive and gives the bodies of whole frames. It holds at most one frame and the last bytes
    fed.

    After a ProtocolError it cannot be used: the start of the next frame is unknown.
    """

    def __init__(self, limit: int = FRAME_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()

    @property
    def in_frame(self) -> bool:
        """Whether the stream would end in the middle of a frame."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields the bodies that `data` completes. Use up the iterator before the next feed.

        Raises: ProtocolError for a length beyond the limit, before its bytes are kept.
        """
        self._buffer += data
        while len(self._buffer) >= LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:LENGTH_BYTES], "big")
            if length > self._limit:
                raise ProtocolError("", _too_long(length, self._limit))
            end = LENGTH_BYTES + length
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[LENGTH_BYTES:end])
            del self._buffer[:end]
            yield body


def identity_of(hello: Hello) -> VmmIdentity:
    """The identity in a `hello`, checked beyond its types. Raises: ProtocolError naming the field; code VERSION."""
    if hello.version != VERSION:
        raise ProtocolError("version", f"is {hello.version}, this daemon speaks {VERSION}", CODE_VERSION)
    layout = MemoryLayout(tuple(model_region(region) for region in hello.regions))
    if hello.state == "incoming":
        if hello.regions:
            raise ProtocolError("regions", f"holds {len(hello.regions)} regions, must be empty in state incoming")
    else:
        problem = layout_problem(layout)
        if problem is not None:
            raise ProtocolError(*problem)
        if hello.vcpus == 0:
            raise ProtocolError("vcpus", f"is 0 in state {hello.state}")
    page_size = hello.memory.page_size
    if page_size is not None and page_size not in PAGE_SIZES:
        raise ProtocolError("memory.page_size", f"{page_size} is not {PAGE_SIZES_TEXT}")
    memory = MemoryKind(page_size, hello.memory.backing)
    abilities = frozenset(hello.abilities)
    return VmmIdentity(
        vm=hello.vm,
        pid=hello.pid,
        platform=hello.platform,
        vcpus=hello.vcpus,
        layout=layout,
        abilities=abilities,
        state=hello.state,
        memory=memory,
        state_bytes=hello.state_bytes,
    )


def entry_of(report: MemoryErrorReport, layout: MemoryLayout, now_us: int) -> LedgerEntry:
    """The ledger entry of a report. Its `gpa` is the first byte of the block.

    Linux gives an `lsb` of 0 where it does not know the size: it is read as a 4 KiB page.

    Raises: ProtocolError if the address is not in the layout.
    """
    if not layout.contains(report.gpa):
        raise ProtocolError("gpa", f"{report.gpa:#x} lies in none of the VM's {len(layout.regions)} regions")
    lsb = max(report.lsb, LSB_4K)
    return LedgerEntry(
        gpa=Gpa(report.gpa >> lsb << lsb),
        origin=Origin.VMM,
        lsb=lsb,
        severity=report.severity,
        guest_visible=report.guest_visible,
        first_seen_us=now_us,
        last_seen_us=now_us,
    )


def model_region(region: HelloRegion | PrepareRegion) -> MemoryRegion:
    return MemoryRegion(Gpa(region.gpa), region.size, region.page_size, region.backing)


def prepare_regions(layout: MemoryLayout) -> list[PrepareRegion]:
    """A layout as `prepare` carries it."""
    return [PrepareRegion(r.gpa, r.size, r.page_size, r.backing) for r in layout.regions]


def _too_long(length: int, limit: int) -> str:
    """Only a device state makes a VMM's frame that long: base64, three bytes in four."""
    words = f"frame of {length} bytes, at most {limit} are allowed"
    return f"{words}; a device state in it has {length * 3 // 4} bytes, at most {DEVICE_STATE_LIMIT} can move"
