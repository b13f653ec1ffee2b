# ruff: noqa: ARG002 a fake has the parameters of its port
"""Pagers without pages. They keep numbered events, and the test decides when the last page arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from vmferry.aio.change_signal import ChangeSignal
from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import held_bytes
from vmferry.model.memory import MemoryLayout, PageRange
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import PageProgress
from vmferry.model.pager import (
    AllPresent,
    LinkChanged,
    PagerEvent,
    PagerEventBody,
    PagerHealth,
    PagerStatus,
    PagesReplaced,
)
from vmferry.testing.script import Script

HELD = (PageRange(0, 0, 16), PageRange(0, 32, 4))
"""The pages that every source holds."""


class FakePager:
    """A fake pager. Its steps are `pager.METHOD`. With `arrives`, all pages arrive once the push starts."""

    def __init__(self, key: str, script: Script, *, arrives: bool) -> None:
        self.key = key
        self.script = script
        self.arrives = arrives
        self.poisoned: dict[int, LedgerEntry] = {}
        self.replaced: set[int] = set()
        """GPAs of poisoned pages in whose place the VMM has put fresh memory."""
        self.serving = False
        self.push_bytes_per_s: int | None = None
        """None: no call has set it."""
        self.preallocated: tuple[PageRange, ...] = ()
        self.layout = MemoryLayout(())
        self.ended = False
        self.looked = 0
        """The number of calls of `status`."""
        self.state = PagerStatus(1, True, "", False, "", False, PageProgress(total=16, absent=16))
        self._events: list[PagerEvent] = []
        self._numbered = 0
        self._changed = ChangeSignal()

    @property
    def memory_socket(self) -> Path:
        return Path("/run/vmferry/vms") / self.key / "memory.sock"

    def emit(self, body: PagerEventBody) -> None:
        self._numbered += 1
        self._events.append(PagerEvent(self._numbered, self._numbered, body))
        self._changed.notify()

    def all_arrive(self) -> None:
        progress = PageProgress(total=16, push=16 - len(self.poisoned), poison=len(self.poisoned))
        self.state = replace(self.state, all_present=True, progress=progress)
        self.emit(AllPresent())

    @property
    def kept_events(self) -> int:
        return len(self._events)

    async def status(self) -> PagerStatus:
        self._must_live()
        self.looked += 1
        await asyncio.sleep(0)
        return self.state

    async def serve_source(self, layout: MemoryLayout, token: str, push_bytes_per_s: int) -> str:
        await self._do("serve_source")
        self.push_bytes_per_s = push_bytes_per_s
        self.layout = layout
        return "127.0.0.1:7700"

    async def list_held(self, layout: MemoryLayout) -> Sequence[PageRange]:
        await self._do("list_held")
        return HELD

    async def set_push_limit(self, push_bytes_per_s: int) -> None:
        await self._do("set_push_limit")
        self.push_bytes_per_s = push_bytes_per_s

    async def freeze(self) -> None:
        await self._do("freeze")
        self.serving = True

    async def thaw(self) -> None:
        await self._do("thaw")
        self.serving = False

    async def expect_destination(self, layout: MemoryLayout) -> Sequence[str]:
        await self._do("expect_destination")
        self.layout = layout
        return ("UFFD_FEATURE_POISON",)

    async def preallocate(self, held: Sequence[PageRange]) -> int:
        await self._do("preallocate")
        self.preallocated = tuple(held)
        return held_bytes(held)

    async def connect_lanes(self, lane_address: str, token: str) -> None:
        await self._do("connect_lanes")
        self.state = replace(self.state, link_up=True)
        self.emit(LinkChanged(up=True, reason=""))

    async def start_push(self) -> None:
        await self._do("start_push")
        if self.arrives and not self.state.all_present:
            self.all_arrive()

    async def complete(self) -> int:
        await self._do("complete")
        return len(self.poisoned)

    async def mark_poisoned(self, errors: Sequence[LedgerEntry]) -> None:
        await self._do("mark_poisoned")
        self.poisoned.update({entry.gpa: entry for entry in errors})

    async def forget_replaced(self) -> int:
        await self._do("forget_replaced")
        gone = [self.poisoned.pop(gpa) for gpa in sorted(self.replaced & self.poisoned.keys())]
        self.replaced.clear()
        if gone:
            self.emit(PagesReplaced(tuple((entry.gpa, entry.lsb) for entry in gone)))
        return len(gone)

    async def events(self, after: int) -> AsyncIterator[PagerEvent]:
        while True:
            seen = self._changed.count
            self._must_live()
            for event in list(self._events):
                if event.number > after:
                    after = event.number
                    yield event
            await self._changed.wait_after(seen)

    async def acknowledge(self, up_to: int) -> None:
        self._must_live()
        self._events = [event for event in self._events if event.number > up_to]

    async def shutdown(self, even_if_guest_dies: bool) -> None:
        await self._do("shutdown")
        self.end()

    def end(self) -> None:
        self.ended = True
        self._changed.notify()

    async def _do(self, name: str) -> None:
        self._must_live()
        await self.script.do(f"pager.{name}")
        self._must_live()

    def _must_live(self) -> None:
        if self.ended:
            raise VmferryError(Reason.PAGER_FAILED, f"the pager {self.key} has ended.")


class FakePagers:
    """The pagers of one host. They outlive the daemon."""

    def __init__(self, script: Script, *, arrives: bool = True) -> None:
        self.script = script
        self.arrives = arrives
        self.running: dict[str, FakePager] = {}

    async def start(self, key: str, vm: str, source: bool) -> FakePager:
        await self.script.do("pagers.start")
        if key not in self.running:
            self.running[key] = FakePager(key, self.script, arrives=self.arrives)
        return self.running[key]

    async def find(self, key: str) -> FakePager | None:
        found = self.running.get(key)
        return None if found is None or found.ended else found

    def health(self, key: str) -> PagerHealth | None:
        found = self.running.get(key)
        if found is None:
            return None
        return PagerHealth(found.state.pid, not found.ended, "was killed by SIGKILL" if found.ended else "")

    async def remove(self, key: str) -> None:
        await self.script.do("pagers.remove")
        gone = self.running.pop(key, None)
        if gone is not None:
            gone.end()
