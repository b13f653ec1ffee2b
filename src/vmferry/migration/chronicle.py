"""The events of this host's migrations, and those that the other host told: in memory at once, on disk soon.

An event that is noted during a blackout costs no write then: a task writes all new events together, and the store makes
it wait while a switchover has reserved it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from vmferry.errors import VmferryError
from vmferry.migration.environment import Environment
from vmferry.model.facts import Event, merged

log = structlog.get_logger()

NOT_WRITTEN = "chronicle.not_written"

WRITE_AFTER_S = 0.5
EVENTS_MOST = 200
"""The most events in memory of one migration; the store has the older ones."""


class Chronicle:
    """Owner of all events. `note` and `take_in` are for any task of this process; `run` is a task of the service."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._known: dict[str, list[Event]] = {}
        self._unwritten: list[tuple[str, Event]] = []
        self._new = asyncio.Event()
        self._number = environment.clock.now_us()
        """Numbers grow across restarts: they begin at the time of this start."""

    def note(self, migration: str, kind: str, words: str = "") -> Event:
        """Adds an event of this host."""
        self._number += 1
        event = Event(self._environment.host, self._number, self._environment.clock.now_us(), kind, words)
        self._add(migration, event)
        return event

    def take_in(self, migration: str, events: Sequence[Event]) -> None:
        """Adds the other host's events. Those that are known are left out."""
        known = {(one.host, one.number) for one in self._known.get(migration, ())}
        for event in events:
            if event.host != self._environment.host and (event.host, event.number) not in known:
                self._add(migration, event)

    def recent(self, migration: str) -> tuple[Event, ...]:
        """The events that memory has: all since this daemon's start."""
        return tuple(self._known.get(migration, ()))

    async def of(self, migration: str) -> tuple[Event, ...]:
        """All events of a migration, in order. Raises: VmferryError STORE_FAILED."""
        return merged(await self._environment.store.events(migration), self.recent(migration))

    async def newest(self, limit: int) -> Sequence[tuple[str, Event]]:
        """(migration, event) of all migrations, the newest first. Raises: VmferryError STORE_FAILED."""
        stored = await self._environment.store.newest_events(limit)
        found = {(name, one.host, one.number): (name, one) for name, one in (*stored, *self._unwritten)}
        return sorted(found.values(), key=lambda pair: -pair[1].at_us)[:limit]

    def of_host(self, migration: str, after: int) -> tuple[Event, ...]:
        """This host's own events with a higher number, for the other host."""
        here = self._environment.host
        return tuple(one for one in self._known.get(migration, ()) if one.host == here and one.number > after)

    def newest_number(self, migration: str, host: str) -> int:
        """The highest number of another host's events that are known here; 0: none."""
        return max((one.number for one in self._known.get(migration, ()) if one.host == host), default=0)

    def forget(self, migration: str) -> None:
        """Lets go of the events in memory. The store keeps them until the migration is deleted."""
        self._known.pop(migration, None)

    async def run(self) -> None:
        """The writing task. It never returns."""
        while True:
            await self._new.wait()
            self._new.clear()
            await asyncio.sleep(WRITE_AFTER_S)
            await self.flush()

    async def flush(self) -> None:
        """Writes the events that are not on disk yet, once."""
        batch, self._unwritten = tuple(self._unwritten), []
        if batch:
            try:
                await self._environment.store.add_events(batch)
            except VmferryError as error:
                log.warning(NOT_WRITTEN, count=len(batch), error=str(error))
                self._unwritten[:0] = batch[-EVENTS_MOST:]

    def _add(self, migration: str, event: Event) -> None:
        events = self._known.setdefault(migration, [])
        events.append(event)
        del events[:-EVENTS_MOST]
        self._unwritten.append((migration, event))
        self._new.set()
