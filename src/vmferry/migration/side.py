"""The live facts of one migration on this host: its present step, its pager, and the other host's last word."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import structlog

from vmferry.aio.change_signal import ChangeSignal
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.environment import Environment
from vmferry.model.facts import HostFacts, Live, PagerFacts, Step

log = structlog.get_logger()

STEP_WAITS = "migration.step_waits"
PAGER_DIED = "migration.pager_died"

SLOW_S = 5.0
"""A step that takes longer says so in the log and among the problems."""


class Side:
    """Owner of the live facts of one side of one migration. `role` is "source" or "destination"."""

    def __init__(self, environment: Environment, chronicle: Chronicle, migration: str, vm: str, role: str) -> None:
        self.migration = migration
        self.vm = vm
        self.live = Live()
        self.changed = ChangeSignal()
        self._environment = environment
        self._chronicle = chronicle
        self._role = role
        self._key = f"{migration}-{role}"

    def note(self, kind: str, words: str = "") -> None:
        """Adds an event to the chronicle."""
        self._chronicle.note(self.migration, kind, words)
        self.changed.notify()

    @contextmanager
    def waits_for(self, what: str, host: str, limit_s: float) -> Iterator[None]:
        """The time of one step. A step that lasts is logged, with the moment at which it ends at the latest."""
        now_us = self._environment.clock.now_us()
        before, step = self.live.step, Step(what, host, now_us, now_us + int(limit_s * 1e6))
        self.live = replace(self.live, step=step)
        timer = asyncio.get_running_loop().call_later(SLOW_S, self._slow, step)
        try:
            yield
        finally:
            timer.cancel()
            self.live = replace(self.live, step=before)

    def look(self) -> None:
        """Looks at the pager's process. Its death becomes an event and an error in the log."""
        health = self._environment.pagers.health(self._key)
        before = self.live.pager
        if health is None:
            if before is not None and before.alive:
                self.live = replace(self.live, pager=None)
            return
        host = self._environment.host
        now = PagerFacts(
            host,
            self._role,
            health.pid,
            health.alive,
            health.exit,
            health.ended_us,
            health.cpu_s,
            health.memory_bytes,
        )
        if now == before:
            return
        self.live = replace(self.live, pager=now)
        if before is None or before.pid != now.pid:
            self.note("pager_started", f"the {self._role}'s pager, pid {now.pid}")
        if not now.alive and (before is None or before.alive):
            self.note("pager_ended", now.death())
            log.error(
                PAGER_DIED,
                migration=self.migration,
                vm=self.vm,
                reason_code="PAGER_FAILED",
                reason=now.death(),
                pid=now.pid,
            )

    def hear(self, there: HostFacts) -> None:
        """Takes in the other host's facts."""
        self._chronicle.take_in(self.migration, there.events)
        there = replace(there, events=())
        if self.live.there is None or replace(self.live.there, at_us=0) != replace(there, at_us=0):
            self.live = replace(self.live, there=there)
            self.changed.notify()

    def facts(self, after: int, **known: Any) -> HostFacts:
        """This host's facts for the other one, with its events after a number."""
        return HostFacts(
            host=self._environment.host,
            step=self.live.step,
            pager=self.live.pager,
            events=self._chronicle.of_host(self.migration, after),
            at_us=self._environment.clock.now_us(),
            **known,
        )

    def heard_events(self) -> int:
        """The highest number of the other host's events that are known here."""
        there = self.live.there
        return self._chronicle.newest_number(self.migration, there.host) if there else 0

    def _slow(self, step: Step) -> None:
        until = datetime.fromtimestamp(step.until_us / 1e6, UTC).strftime("%H:%M:%SZ")
        words = f"{step.words()}, until {until}"
        self.note("step_waits", words)
        log.warning(
            STEP_WAITS,
            migration=self.migration,
            vm=self.vm,
            reason=words,
            step_host=step.host,
            until=until,
        )
