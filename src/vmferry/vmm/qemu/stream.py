"""QEMU's migration stream, as far as vmferry makes or reads one (QEMU: migration/savevm.c, migration/ram.c). Pure.

```
 magic, version │ 07 machine name │ 01 "ram": blocks │ 03 "ram": pages │ 04 devices … │ 00 │ 06 description
 ── QEMU ───────┘ └──────────────── vmferry ─────────────────────────┘ └─── QEMU ────────┘ └── vmferry ──
```
`xen-save-devices-state` gives header, devices and end only. `migrate` with `x-ignore-shared` gives all of it.
Devices are opaque: their format depends on the machine.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

MAGIC = b"QEVM"
VERSION = 3
EOF, START, PART, END, FULL = 0, 1, 2, 3, 4
SUBSECTION, DESCRIPTION, CONFIGURATION, FOOTER = 5, 6, 7, 0x7E
RAM_VERSION = 4
RAM_ID = 0x7FFFFFFE
"""Of the "ram" section that vmferry adds; QEMU numbers its own from 0."""

ZERO, SIZES, PAGE, END_OF_SECTION, SAME_BLOCK = 0x02, 0x04, 0x08, 0x10, 0x20
PAGE_BYTES = 4096
_FLAGS = PAGE_BYTES - 1
_NO_PAGE = bytes(PAGE_BYTES)

IGNORE_SHARED = "x-ignore-shared"

GLOBAL_STATE = b"\x0bglobalstate"
_RUNNING = struct.pack(">III", 0, 1, 8) + b"running\0"
_PAUSED = struct.pack(">III", 0, 1, 7) + b"paused\0\0"

STREAM_MAX = 512 << 20
"""Bytes of memory that a stream may claim for its small blocks."""


class StreamError(ValueError):
    """The bytes are no migration stream that vmferry knows; `at` is the offset."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"offset {at:#x} of the device state: {what}")
        self.at = at


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block with its contents; `address` is its GPA, which streams with x-ignore-shared tell."""

    name: str
    contents: bytes
    address: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """A whole stream. `devices` are the sections behind "ram", without the end mark."""

    machine: str
    blocks: tuple[Block, ...]
    devices: bytes
    ignored: tuple[str, ...] = ()
    """Blocks that are named with their sizes but have no pages: shared memory that stays where it is."""
    capabilities: tuple[str, ...] = field(default=())


def encode(machine: str, blocks: Sequence[Block], devices: bytes) -> bytes:
    """A stream that any QEMU of this machine type loads, without a special capability."""
    name = machine.encode()
    parts = [MAGIC, struct.pack(">IBI", VERSION, CONFIGURATION, len(name)), name]
    if blocks:
        parts += _ram_section(blocks)
    parts += [devices, struct.pack(">BBI", EOF, DESCRIPTION, 0)]
    return b"".join(parts)


def _ram_section(blocks: Sequence[Block]) -> list[bytes]:
    total = sum(len(block.contents) for block in blocks)
    end = struct.pack(">QBI", END_OF_SECTION, FOOTER, RAM_ID)
    parts = [struct.pack(">BI", START, RAM_ID), _text("ram"), struct.pack(">II", 0, RAM_VERSION)]
    parts.append(struct.pack(">Q", total | SIZES))
    parts += [_text(block.name) + struct.pack(">Q", len(block.contents)) for block in blocks]
    parts += [end, struct.pack(">BI", END, RAM_ID)]
    for block in blocks:
        parts += _pages(block)
    return [*parts, end]


def _pages(block: Block) -> list[bytes]:
    parts: list[bytes] = []
    view = memoryview(block.contents)
    for offset in range(0, len(view), PAGE_BYTES):
        page = view[offset : offset + PAGE_BYTES]
        zero = page == _NO_PAGE
        flags = (ZERO if zero else PAGE) | (SAME_BLOCK if offset else 0)
        parts.append(struct.pack(">Q", offset | flags))
        if not offset:
            parts.append(_text(block.name))
        parts.append(b"\0" if zero else page)  # type: ignore[arg-type]  # join takes any buffer
    return parts


def _text(text: str) -> bytes:
    raw = text.encode()
    return bytes([len(raw)]) + raw


def devices_of_save(saved: bytes) -> bytes:
    """The device sections in a file of `xen-save-devices-state`. Raises: StreamError."""
    reader = _Reader(saved)
    reader.header()
    if len(saved) <= reader.at or saved[-1] != EOF:
        raise StreamError(len(saved), "no end mark: the file was cut short")
    if saved[reader.at] != FULL:
        raise StreamError(reader.at, f"section type {saved[reader.at]:#x} where devices begin")
    return saved[reader.at : -1]


def paused(devices: bytes) -> bytes:
    """The devices with a run state that makes the destination wait for `cont`. A guest may write the look of that
    section into a device's memory; so only a unique one is taken. Raises: StreamError."""
    here = devices.find(GLOBAL_STATE)
    if here < 0 or devices.find(GLOBAL_STATE, here + 1) >= 0:
        raise StreamError(max(here, 0), 'not exactly one section "globalstate"')
    begin = here + len(GLOBAL_STATE)
    state = devices[begin : begin + len(_RUNNING)]
    if state == _PAUSED:
        return devices
    if state != _RUNNING:
        raise StreamError(begin, f"run state {state!r} is neither running nor paused")
    return devices[:begin] + _PAUSED + devices[begin + len(_PAUSED) :]


def decode(data: bytes) -> Stream:
    """A whole stream, of `encode` or of `migrate`. Raises: StreamError."""
    reader = _Reader(data)
    reader.header()
    reader.section(CONFIGURATION)
    machine = reader.take(reader.number(">I"), "the machine's name").decode("ascii", "replace")
    capabilities = reader.subsections()
    ignores = IGNORE_SHARED in capabilities
    sizes: dict[str, tuple[int, int]] = {}
    pages: dict[str, bytearray] = {}
    if reader.peek() == START:
        sizes = reader.ram_start(ignores)
        pages = {name: bytearray() for name in sizes}
        while reader.peek() in (PART, END):
            last = reader.byte() == END
            reader.ram_pages(sizes, pages)
            if last:
                break
    if reader.peek() != FULL:
        raise StreamError(reader.at, f"section type {reader.peek():#x} where devices begin")
    blocks = tuple(Block(name, bytes(pages[name]), sizes[name][1]) for name in sizes if pages[name])
    ignored = tuple(name for name in sizes if not pages[name])
    return Stream(machine, blocks, reader.devices(), ignored, capabilities)


class _Reader:
    """A place in the bytes; every step checks the rest."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self._ram_id = 0
        self._block = ""

    def take(self, size: int, what: str) -> bytes:
        end = self.at + size
        if size > len(self.data) or end > len(self.data):
            raise StreamError(self.at, f"ends within {what}")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, form: str) -> int:
        value: int = struct.unpack(form, self.take(struct.calcsize(form), "a number"))[0]
        return value

    def byte(self) -> int:
        return self.take(1, "a section's type")[0]

    def peek(self) -> int:
        if self.at >= len(self.data):
            raise StreamError(self.at, "ends where a section begins")
        return self.data[self.at]

    def text(self) -> str:
        return self.take(self.take(1, "a name's length")[0], "a name").decode("utf-8", "replace")

    def header(self) -> None:
        if self.take(4, "the header") != MAGIC:
            raise StreamError(0, "no migration stream of QEMU")
        if (version := self.number(">I")) != VERSION:
            raise StreamError(4, f"version {version}; vmferry knows {VERSION}")

    def section(self, kind: int) -> None:
        if (found := self.byte()) != kind:
            raise StreamError(self.at - 1, f"section type {found:#x} instead of {kind:#x}")

    def subsections(self) -> tuple[str, ...]:
        """Of the configuration; the capabilities that it demands."""
        capabilities: tuple[str, ...] = ()
        while self.peek() == SUBSECTION:
            self.byte()
            name = self.text()
            self.number(">I")
            match name:
                case "configuration/capabilities":
                    count = self.number(">I")
                    if count > len(self.data):
                        raise StreamError(self.at, f"{count} capabilities")
                    capabilities = tuple(self.text() for _ in range(count))
                case "configuration/target-page-bits":
                    self.number(">I")
                case "configuration/uuid":
                    self.take(16, "a UUID")
                case _:
                    raise StreamError(self.at, f"subsection {name!r} is not known")
        return capabilities

    def ram_start(self, ignores: bool) -> dict[str, tuple[int, int]]:
        """Names of the blocks, their sizes and addresses."""
        begin = self.at
        self.section(START)
        self._ram_id = self.number(">I")
        name = self.text()
        instance, version = self.number(">I"), self.number(">I")
        if (name, instance, version) != ("ram", 0, RAM_VERSION):
            raise StreamError(begin, f'section "{name}" {instance}, version {version}, instead of "ram"')
        head = self.number(">Q")
        if head & _FLAGS != SIZES:
            raise StreamError(begin, f"no sizes of blocks, but flags {head & _FLAGS:#x}")
        left = head & ~_FLAGS
        blocks: dict[str, tuple[int, int]] = {}
        while left > 0:
            block, size = self.text(), self.number(">Q")
            address = self.number(">Q") if ignores else 0
            if size == 0 or size % PAGE_BYTES or size > left or block in blocks:
                raise StreamError(self.at, f"block {block!r} of {size:#x} bytes, {left:#x} are left")
            blocks[block] = (size, address)
            left -= size
        self._end_of_part()
        return blocks

    def _end_of_part(self) -> None:
        mark, kind, number = self.number(">Q"), self.byte(), self.number(">I")
        if (mark, kind, number) != (END_OF_SECTION, FOOTER, self._ram_id):
            raise StreamError(self.at, f'the end of a part of "ram" is {mark:#x}, {kind:#x}, {number:#x}')

    def ram_pages(self, sizes: dict[str, tuple[int, int]], pages: dict[str, bytearray]) -> None:
        if (number := self.number(">I")) != self._ram_id:
            raise StreamError(self.at, f"a part of section {number:#x}, which has not begun")
        while (self._peek_mark() & _FLAGS) != END_OF_SECTION:
            head = self.number(">Q")
            offset, flags = head & ~_FLAGS, head & _FLAGS
            if not flags & SAME_BLOCK:
                self._block = self.text()
            if self._block not in sizes or offset >= sizes[self._block][0]:
                raise StreamError(self.at, f"a page at {offset:#x} of block {self._block!r}")
            page = self._page(flags & ~SAME_BLOCK)
            contents = pages[self._block]
            if not contents:
                size = sizes[self._block][0]
                if size + sum(map(len, pages.values())) > STREAM_MAX:
                    raise StreamError(self.at, f"more than {STREAM_MAX} bytes of blocks")
                contents.extend(bytes(size))
            contents[offset : offset + PAGE_BYTES] = page
        self._end_of_part()

    def _peek_mark(self) -> int:
        at = self.at
        mark = self.number(">Q")
        self.at = at
        return mark

    def _page(self, flags: int) -> bytes:
        match flags:
            case 0x02:  # ZERO
                return self.take(1, "a page of one byte") * PAGE_BYTES
            case 0x08:  # PAGE
                return self.take(PAGE_BYTES, "a page")
            case _:
                raise StreamError(self.at, f"a page with flags {flags:#x}")

    def devices(self) -> bytes:
        """The rest without its end mark and description; the description has its own length."""
        begin = self.at
        for end in (len(self.data) - 5, *_descriptions(self.data, begin)):
            length = struct.unpack_from(">I", self.data, end + 1)[0] if end > begin else -1
            if end + 5 + length == len(self.data) and self.data[end - 1] == EOF and self.data[end] == DESCRIPTION:
                return self.data[begin : end - 1]
        if self.data[-1] == EOF:
            return self.data[begin:-1]
        raise StreamError(len(self.data), "no end mark: the stream was cut short")


def _descriptions(data: bytes, begin: int) -> Sequence[int]:
    """Where a description may begin: behind an end mark, an object of JSON up to the last byte."""
    found = []
    at = data.find(b"\x00\x06", begin)
    while at >= 0:
        if data[at + 6 : at + 7] == b"{":
            found.append(at + 1)
        at = data.find(b"\x00\x06", at + 1)
    return found
