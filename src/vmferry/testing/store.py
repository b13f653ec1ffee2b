"""`ports.Store` in memory. It outlives the service of a test, as a file outlives a daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vmferry.ledger.merge import merge_all
from vmferry.model.facts import Event
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import TERMINAL, Incoming, Job
from vmferry.model.totals import Totals
from vmferry.testing.script import Script


class MemoryStore:
    """A store in memory. Steps: `store.job PHASE`, `store.journal KIND`, `store.incoming OUTCOME`, `store.errors`,
    `store.reserve`."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.reserved: set[str] = set()
        self._revisions: list[Job] = []
        self._revision = 0
        self._journal: list[JournalEntry] = []
        self._incomings: dict[str, Incoming] = {}
        self._lives: dict[str, tuple[str, int]] = {}
        self._ledger: list[tuple[int, str, LedgerEntry]] = []
        self._events: dict[tuple[str, str, int], Event] = {}
        self._totals = Totals()

    async def save_job(self, job: Job) -> Job:
        saved: list[Job] = []

        def write() -> None:
            before = self._newest().get(job.migration)
            if job.phase in TERMINAL and (before is None or before.phase not in TERMINAL):
                self._totals = self._totals.with_job(job)
            self._revision += 1
            saved.append(replace(job, revision=self._revision))
            self._revisions.append(saved[0])

        await self.script.do(f"store.job {job.phase}", write)
        return saved[0]

    async def job(self, migration: str) -> Job | None:
        return self._newest().get(migration)

    async def jobs(self) -> Sequence[Job]:
        return list(self._newest().values())

    async def job_revisions(self, after: int, limit: int) -> Sequence[Job]:
        return [job for job in self._revisions if job.revision > after][:limit]

    async def reserve(self, key: str) -> None:
        await self.script.do("store.reserve", lambda: self.reserved.add(key))

    def release(self, key: str) -> None:
        self.reserved.discard(key)

    async def append_journal(self, entry: JournalEntry) -> None:
        await self.script.do(f"store.journal {entry.kind}", lambda: self._journal.append(entry))

    async def journal(self, migration: str) -> Sequence[JournalEntry]:
        return [entry for entry in self._journal if entry.migration == migration]

    async def save_incoming(self, incoming: Incoming) -> None:
        def write() -> None:
            before = self._incomings.get(incoming.migration)
            if incoming.ended and incoming.vm and (before is None or not before.ended):
                self._totals = self._totals.with_incoming(incoming)
            self._incomings[incoming.migration] = incoming

        await self.script.do(f"store.incoming {incoming.outcome}", write)

    async def incoming(self, migration: str) -> Incoming | None:
        return self._incomings.get(migration)

    async def incomings(self) -> Sequence[Incoming]:
        return list(self._incomings.values())

    async def incoming_journals(self) -> Mapping[str, Sequence[JournalEntry]]:
        return {name: [entry for entry in self._journal if entry.migration == name] for name in self._incomings}

    async def totals(self) -> Totals:
        return self._totals

    async def add_events(self, events: Sequence[tuple[str, Event]]) -> None:
        """No step: events are for people, and no decision reads them."""
        for migration, event in events:
            self._events.setdefault((migration, event.host, event.number), event)

    async def events(self, migration: str) -> Sequence[Event]:
        return [event for (name, _, _), event in self._events.items() if name == migration]

    async def newest_events(self, limit: int) -> Sequence[tuple[str, Event]]:
        return [(name, event) for (name, _, _), event in self._events.items()][::-1][:limit]

    async def forget(self, jobs: Sequence[str], incomings: Sequence[str]) -> None:
        self._revisions = [job for job in self._revisions if job.migration not in jobs]
        for name in incomings:
            self._incomings.pop(name, None)
        for name in {*jobs, *incomings}:
            if name not in self._newest() and name not in self._incomings:
                self._journal = [entry for entry in self._journal if entry.migration != name]
                self._events = {key: event for key, event in self._events.items() if key[0] != name}

    async def record_errors(self, vm: str, errors: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
        changed: list[LedgerEntry] = []

        def write() -> None:
            known = {entry.gpa: entry for entry in self._living(vm)}
            for entry in merge_all(known, errors).values():
                self._ledger.append((len(self._ledger) + 1, vm, entry))
                changed.append(entry)

        await self.script.do("store.errors", write)
        return changed

    async def ledger(self, vm: str) -> Sequence[LedgerEntry]:
        newest = {entry.gpa: entry for entry in self._living(vm)}
        return sorted(newest.values(), key=lambda entry: entry.gpa)

    async def ledger_changes(self, vm: str, after: int, limit: int) -> Sequence[tuple[int, str, LedgerEntry]]:
        return [change for change in self._ledger[after:] if vm in ("", change[1]) and self._lives_on(change)][:limit]

    async def life(self, vm: str) -> str:
        return self._lives.get(vm, ("", 0))[0]

    async def begin_life(self, vm: str, life: str, keeps_ledger: bool) -> None:
        def write() -> None:
            kept = self._lives.get(vm, ("", 0))[1]
            self._lives[vm] = (life, kept if keeps_ledger else len(self._ledger))

        await self.script.do("store.life", write)

    def kinds(self) -> set[str]:
        """The kinds of all journal entries. Reading them is no step."""
        return {entry.kind for entry in self._journal}

    def _living(self, vm: str) -> list[LedgerEntry]:
        return [change[2] for change in self._ledger if change[1] == vm and self._lives_on(change)]

    def _lives_on(self, change: tuple[int, str, LedgerEntry]) -> bool:
        return change[0] > self._lives.get(change[1], ("", 0))[1]

    def _newest(self) -> dict[str, Job]:
        return {job.migration: job for job in self._revisions}
