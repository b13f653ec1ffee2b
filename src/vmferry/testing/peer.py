"""The destination side of another daemon, in this process, over a wire that can be cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from vmferry.errors import Reason, VmferryError
from vmferry.model.facts import HostFacts
from vmferry.model.incoming import IncomingUpdate, Wanted
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Outcome
from vmferry.testing.script import Script

Answer = TypeVar("Answer")


class Destination(Protocol):
    """The part of `IncomingService` that a peer calls."""

    async def admit(self, migration: str, job: str) -> None: ...
    async def hello(self, migration: str) -> str: ...
    async def prepare(self, migration: str, wanted: Wanted, source_host: str = "") -> None: ...
    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None: ...
    async def start(self, migration: str) -> int: ...
    async def refuse(self, migration: str, reason: str) -> None: ...
    async def outcome(self, migration: str) -> tuple[Outcome, str]: ...
    def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]: ...
    async def finish(self, migration: str) -> None: ...
    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]: ...


NOTICE_S = 0.01
"""A stream notices the end of its daemon after this time."""

Find = Callable[[str], Destination | None]


class FakePeers:
    """Peers by address. `find` returns the daemon that listens there, or None. Steps: `peer.METHOD`."""

    def __init__(self, script: Script, find: Find) -> None:
        self.script = script
        self.find = find

    def connect(self, address: str, job: str) -> FakePeer:
        return FakePeer(self, address, job)


class FakePeer:
    """One peer. As over a network, a call keeps running on the other side when its caller is cancelled."""

    def __init__(self, peers: FakePeers, address: str, job: str) -> None:
        self._peers = peers
        self._address = address
        self._job = job

    async def hello(self, migration: str) -> str:
        return await self._call("hello", migration, lambda there: there.hello(migration))

    async def prepare(self, migration: str, wanted: Wanted) -> None:
        await self._call("prepare", migration, lambda there: there.prepare(migration, wanted, self._peers.script.host))

    async def ready(self, migration: str, device_state: bytes, ledger: Sequence[LedgerEntry]) -> None:
        await self._call("ready", migration, lambda there: there.ready(migration, device_state, ledger))

    async def start(self, migration: str) -> int:
        return await self._call("start", migration, lambda there: there.start(migration))

    async def refuse(self, migration: str, reason: str) -> None:
        try:
            await self._call("refuse", migration, lambda there: there.refuse(migration, reason))
        except VmferryError as error:
            if error.reason is not Reason.MIGRATION_EXISTS:
                raise

    async def outcome(self, migration: str) -> tuple[Outcome, str]:
        return await self._call("outcome", migration, lambda there: there.outcome(migration))

    async def watch(self, migration: str) -> AsyncIterator[IncomingUpdate]:
        await self._peers.script.do("peer.watch")
        there = self._there()
        await there.admit(migration, self._job)
        updates = there.watch(migration)
        while True:
            coming = asyncio.ensure_future(_next(updates))
            try:
                while not coming.done():
                    await asyncio.wait((coming,), timeout=NOTICE_S)
                    if self._peers.find(self._address) is not there:
                        raise self._unreachable()
            finally:
                coming.cancel()
            update = coming.result()
            if update is None:
                return
            yield update

    async def finish(self, migration: str) -> None:
        await self._call("finish", migration, lambda there: there.finish(migration))

    async def exchange(self, migration: str, facts: HostFacts, heard: int) -> tuple[HostFacts, int]:
        """No step: it changes nothing that a decision reads."""
        there = self._there()
        await there.admit(migration, self._job)
        return await there.exchange(migration, facts, heard)

    async def close(self) -> None:
        pass

    async def _admitted(
        self, there: Destination, migration: str, ask: Callable[[Destination], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        await there.admit(migration, self._job)
        return await ask(there)

    async def _call(
        self, name: str, migration: str, ask: Callable[[Destination], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """A call that can fail before it is sent, or after its effect: then its answer is lost."""
        answers: list[Answer] = []
        await self._peers.script.do(f"peer.{name}")
        there = self._there()
        work = asyncio.ensure_future(self._admitted(there, migration, ask))
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # the caller may be gone
        try:
            answers.append(await _apart(work))
        except asyncio.CancelledError:
            if work.cancelled() and self._peers.find(self._address) is not there:
                raise self._unreachable() from None
            raise
        await self._peers.script.do(f"peer.{name} answered")
        return answers[0]

    def _there(self) -> Destination:
        found = self._peers.find(self._address)
        if found is None:
            raise self._unreachable()
        return found

    def _unreachable(self) -> VmferryError:
        return VmferryError(
            Reason.DESTINATION_UNREACHABLE, f"nobody answers at {self._address}.", "Is vmferryd running there?"
        )


async def _next(updates: AsyncIterator[IncomingUpdate]) -> IncomingUpdate | None:
    return await anext(updates, None)


async def _apart(work: asyncio.Future[Answer]) -> Answer:
    waiting: Awaitable[Answer] = asyncio.shield(work)
    return await waiting
