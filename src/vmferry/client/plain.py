"""Messages of the API as JSON-ready values for programs and as words for people. Pure.

Names are those of the protos. Enumerations lose their common prefix (`PHASE_POSTCOPY` → "POSTCOPY"). Addresses are
hexadecimal strings, because many readers of JSON lose integers above 2^53. Timestamps are RFC 3339. Fields without a
value are present, so a program needs no defaults of its own.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Plain: TypeAlias = "dict[str, Any]"

ADDRESS_FIELDS = frozenset({"gpa", "hva"})


def plain(message: Message) -> Plain:
    """The message as a dictionary."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(item, field) for item in value]
    if field.message_type is not None and not message.HasField(field.name):
        return None
    return _value(value, field)


def _value(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if field.name in ADDRESS_FIELDS:
        return f"{value:#x}"
    if isinstance(value, bytes):
        return value.hex()
    return value


def enum_word(enum: Any, number: int) -> str:
    """The name of an enumeration's value without the common prefix. A number of a newer daemon stays a number.

    In every enumeration of vmferry the first value is `<PREFIX>UNSPECIFIED`.
    """
    known = enum.values_by_number.get(number)
    if known is None:
        return str(number)
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(known.name.removeprefix(prefix))


def size_words(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def limit_words(bytes_per_s: int) -> str:
    """A push limit for people."""
    return f"{size_words(bytes_per_s)}/s" if bytes_per_s else "none"


def age_words(seconds: float) -> str:
    """A time since something, short: 36s, 5m12s, 3h04m, 2d."""
    whole = int(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d"


def duration_words(seconds: float) -> str:
    """A duration for people."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
