"""Room for journal entries while the disk is full.

A file of its full size: a write into it needs no space (not on a file system that copies on write). Entries stay there
until the database takes them in.

| bytes of a slot | content |
|---|---|
| 0 to 3 | length of the entry, little-endian; 0: the slot is free |
| 4 to 7 | CRC-32 of the entry |
| from 8 on | the entry in JSON |

Slots are used in order. A slot whose sum is wrong was being written when the host went down, and was not acknowledged.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmferry.model.journal import JournalEntry

SLOT_BYTES = 4096
SLOTS = 128

_HEAD = struct.Struct("<II")


class SpareJournal:
    """Owner of the file. For one thread."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(self._fd).st_size < SLOTS * SLOT_BYTES:
                os.pwrite(self._fd, bytes(SLOTS * SLOT_BYTES), 0)
                os.fsync(self._fd)
                _sync_directory(path.parent)
            self._entries = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def entries(self) -> Sequence[JournalEntry]:
        """In the order of their appending."""
        return tuple(self._entries)

    @property
    def free(self) -> int:
        """The number of entries that still fit."""
        return SLOTS - len(self._entries)

    def append(self, entry: JournalEntry) -> bool:
        """The entry is durable when this returns. False: it is too long, or no slot is free. Raises: OSError."""
        text = msgspec.json.encode(entry)
        if self.free == 0 or len(text) > SLOT_BYTES - _HEAD.size:
            return False
        slot = _HEAD.pack(len(text), zlib.crc32(text)) + text
        os.pwrite(self._fd, slot, len(self._entries) * SLOT_BYTES)
        os.fdatasync(self._fd)
        self._entries.append(entry)
        return True

    def clear(self) -> None:
        """The database has all entries. Raises: OSError."""
        for number in range(len(self._entries)):
            os.pwrite(self._fd, bytes(_HEAD.size), number * SLOT_BYTES)
        os.fdatasync(self._fd)
        self._entries.clear()

    def close(self) -> None:
        os.close(self._fd)

    def _read(self) -> list[JournalEntry]:
        found: list[JournalEntry] = []
        for number in range(SLOTS):
            slot = os.pread(self._fd, SLOT_BYTES, number * SLOT_BYTES)
            length, wanted = _HEAD.unpack_from(slot)
            text = slot[_HEAD.size : _HEAD.size + length]
            if not 0 < length <= SLOT_BYTES - _HEAD.size or zlib.crc32(text) != wanted:
                break
            found.append(msgspec.json.decode(text, type=JournalEntry))
        return found


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
