"""The runner performs each command of a step, or raises before it does anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

import pytest

from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.environment import Environment
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.job_feed import JobFeed
from vmferry.migration.source.job_runner import PERFORMED, JobRunner
from vmferry.model.migration import Job
from vmferry.testing.host import Pair
from vmferry.testing.peer import FakePeers


def foreign() -> Iterator[tuple[m.State, m.Command]]:
    """Each state with each command that it does not perform."""
    for state, performed in PERFORMED.items():
        for kind in set(get_args(m.Command)) - set(performed):
            yield state, kind(m.JournalKind.BEGIN) if fields(kind) else kind()


def test_every_state_names_the_commands_it_performs() -> None:
    assert set(PERFORMED) == set(m.State)


def spawn(_name: str, _work: object) -> None:
    """Starts nothing."""


async def test_a_command_that_nothing_performs_raises(pair: Pair) -> None:
    host = pair.a
    environment = Environment(
        host="a",
        store=host.store,
        vmms=host.vmms,
        pagers=host.pagers,
        peers=FakePeers(host.script, pair.network.find),
    )
    recorder = LedgerRecorder(host.store)
    runner = JobRunner(environment, JobFeed(host.store), recorder, Chronicle(environment), Job("m1", "web", "b"), spawn)
    for state, command in foreign():
        with pytest.raises(AssertionError, match=f"nothing performs .*{type(command).__name__}.* in state {state}"):
            await runner._perform(m.Transition(state, (command,)))
    assert host.script.transcript == []
