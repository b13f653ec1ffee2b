"""The command line of a QEMU that waits for a VM, from that of the VM's QEMU. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_DROPPED_WITH_VALUE = ("incoming", "loadvm")
_DROPPED = ("S",)
_MACHINE = ("machine", "M")
WAITS = ("-S", "-incoming", "defer")


def destination_command(source: Sequence[str], machine_type: str) -> list[str]:
    """The same command, which waits for a state, and with the machine type in full: an alias stands for another type in
    another version. Paths of sockets and files are the source's."""
    made: list[str] = []
    words = iter(source)
    typed = False
    for word in words:
        option = _option(word)
        if option in _DROPPED:
            continue
        if option in _DROPPED_WITH_VALUE:
            next(words, None)
            continue
        made.append(word)
        if option in _MACHINE:
            made.append(_with_type(next(words, ""), machine_type))
            typed = True
    if not typed:
        made += ["-machine", machine_type]
    return [*made, *WAITS]


def _option(word: str) -> str:
    """QEMU takes one or two dashes."""
    return word.removeprefix("-").removeprefix("-") if word.startswith("-") else ""


def _with_type(value: str, machine_type: str) -> str:
    """The type is the first part without a key, or that of the key "type"."""
    parts = value.split(",")
    rest = [part for part in parts if "=" in part and not part.startswith("type=")]
    return ",".join([machine_type, *rest])
