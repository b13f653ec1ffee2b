"""The stage of a move, kept in QEMU itself, where a restarted daemon finds it.

A mark is a descriptor set of QEMU's monitor with a text. QEMU keeps such a set while its vCPUs are stopped, also
without a client on the monitor.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vmferry.vmm.qemu.facts import FdsetInfo
from vmferry.vmm.qemu.monitor import Monitor

_STAGES = ("prepared", "loading", "running", "stopped")
"""In the order in which a QEMU passes through them."""
_TEXT = re.compile(rf"vmferry:({'|'.join(_STAGES)})(?::uffd=(\d+))?")


@dataclass(frozen=True, slots=True)
class Mark:
    """`uffd`: number of the userfaultfd in QEMU."""

    stage: str
    uffd: int | None = None

    @property
    def text(self) -> str:
        return f"vmferry:{self.stage}" + (f":uffd={self.uffd}" if self.uffd is not None else "")


def parse_mark(text: str) -> Mark | None:
    found = _TEXT.fullmatch(text)
    return Mark(found[1], int(found[2]) if found[2] else None) if found else None


def vm_state(status: str, mark: Mark | None) -> str | None:
    """The state that the VMM protocol knows; None where vmferry must leave the VM alone."""
    match status, mark.stage if mark else None:
        case "running", _:
            return "running"
        case "inmigrate", "prepared" | "loading":
            return mark.stage if mark and mark.stage == "prepared" else "loaded"
        case "inmigrate", _:
            return "incoming"
        case "paused", "loading":
            return "loaded"
        case "paused" | "postmigrate", "stopped":
            return "stopped"
        case _:
            return None


class Marks:
    """The marks of one QEMU. This connection alone changes them, so they are asked for once, and
    again after a command without an answer."""

    def __init__(self, monitor: Monitor, within_s: float) -> None:
        self._monitor = monitor
        self._within_s = within_s
        self._known: dict[int, Mark] | None = None

    async def read(self) -> Mark | None:
        """The one that counts: the latest stage."""
        found = (await self._all()).values()
        return max(found, key=lambda mark: _STAGES.index(mark.stage), default=None)

    async def put(self, mark: Mark) -> None:
        """Adds one of a later stage; those before stay. One command: for the blackout."""
        known = await self._all()
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            added = await self._monitor.add_fd(nothing, mark.text, self._within_s)
        except BaseException:
            self._known = None  # it may be there all the same
            raise
        finally:
            os.close(nothing)
        known[added.fdset_id] = mark

    async def replace(self, mark: Mark | None) -> None:
        """The new one is there before the old ones go."""
        known = await self._all()
        old = list(known)
        if mark is not None:
            await self.put(mark)
        for number in old:
            try:
                await self._monitor.ask("remove-fd", self._within_s, {"fdset-id": number})
            except BaseException:
                self._known = None
                raise
            del known[number]

    async def _all(self) -> dict[int, Mark]:
        """By descriptor set."""
        if self._known is None:
            sets = await self._monitor.ask_for(list[FdsetInfo], "query-fdsets", self._within_s)
            self._known = {one.fdset_id: mark for one in sets for fd in one.fds if (mark := parse_mark(fd.opaque))}
        return self._known
