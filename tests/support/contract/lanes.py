"""The framing of lanes, as the comments of pages.proto have it: values to bytes and back.

It writes any numbers, also those that the contract forbids, and does not judge frames that it reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

VERSION = 3
MAGIC = b"VMFLANE1"
TOKEN_BYTES = 32
PROBE = bytes(16384)
"""Bytes that fill packets each way before a lane is open; the source sends `MAGIC` before."""
PAGE = 4096
MOST_DATA_PAGES = 64


class Kind(IntEnum):
    """The kind of a frame's content."""

    DATA = 1
    ZERO = 2
    POISON = 3
    END = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class Hello:
    """Destination → source, once, with its probe."""

    FORM = struct.Struct("<8s32s")
    token: bytes
    magic: bytes = MAGIC

    def encode(self) -> bytes:
        return self.FORM.pack(self.magic, self.token) + PROBE

    @classmethod
    def decode(cls, message: bytes) -> Self:
        """Raises: struct.error if the length is not that of `FORM`."""
        magic, token = cls.FORM.unpack(message)
        return cls(token, magic)


@dataclass(frozen=True, slots=True)
class Ask:
    """Destination → source on the urgent lane; in pages of 4 KiB."""

    FORM = struct.Struct("<IIQ")
    region: int
    page: int
    count: int

    def encode(self) -> bytes:
        return self.FORM.pack(self.region, self.count, self.page)

    @classmethod
    def decode(cls, message: bytes) -> Self:
        """Raises: struct.error if the length is not that of `FORM`."""
        region, count, page = cls.FORM.unpack(message)
        return cls(region, page, count)


@dataclass(frozen=True, slots=True)
class Frame:
    """Source → destination. `body` follows the 24 bytes: pages of a DATA, the text of a FAILED."""

    FORM = struct.Struct("<BBBBIQII")
    kind: int
    region: int = 0
    page: int = 0
    count: int = 0
    origin: int = 0
    guest_visible: int = 0
    hop: int = 0
    body: bytes = b""

    def encode(self) -> bytes:
        numbers = (self.kind, self.origin, self.guest_visible, 0, self.region, self.page, self.count, self.hop)
        return self.FORM.pack(*numbers) + self.body

    @classmethod
    def decode(cls, head: bytes, body: bytes = b"") -> Self:
        """Raises: struct.error if the length of `head` is not that of `FORM`; ValueError if its padding is not 0."""
        kind, origin, guest_visible, padding, region, page, count, hop = cls.FORM.unpack(head)
        if padding:
            raise ValueError(f"byte 3 of a frame is {padding}, not 0")
        return cls(kind, region, page, count, origin, guest_visible, hop, body)

    @property
    def body_bytes(self) -> int:
        """Length of the body, from the 24 bytes alone."""
        return {Kind.DATA: self.count * PAGE, Kind.FAILED: self.count}.get(Kind(self.kind), 0)

    @property
    def pages(self) -> range:
        """In their region."""
        return range(self.page, self.page + self.count)

    def contents(self, page: int) -> bytes:
        """Of one page of a DATA."""
        start = (page - self.page) * PAGE
        return self.body[start : start + PAGE]


def data(region: int, page: int, contents: bytes) -> Iterator[Frame]:
    """DATA frames of consecutive pages, as long as they may be."""
    for start in range(0, len(contents), MOST_DATA_PAGES * PAGE):
        body = contents[start : start + MOST_DATA_PAGES * PAGE]
        yield Frame(Kind.DATA, region, page + start // PAGE, len(body) // PAGE, body=body)


def failed(reason: str) -> Frame:
    """A FAILED with its text."""
    text = reason.encode()
    return Frame(Kind.FAILED, count=len(text), body=text)
