"""The state of each VM of a host, from what is known of it."""

from __future__ import annotations

import pytest

from vmferry.api.control import Machine, MachineState
from vmferry.daemon.machine_views import machines
from vmferry.migration.model import Incoming, Job, MemoryLayout, Outcome, PageProgress, Phase, VmmIdentity


def vmm(state: str, pid: int = 1, vm: str = "web") -> VmmIdentity:
    return VmmIdentity(vm, pid, "x86_64/kvm", 2, MemoryLayout(()), frozenset(), state)


def only(found: list[Machine]) -> Machine:
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("state", "phase", "outcome", "shown", "migration"),
    [
        ("running", None, None, MachineState.RUNNING, ""),
        ("running", Phase.PREPARING, None, MachineState.MIGRATING_OUT, "out"),
        ("stopped", Phase.SWITCHOVER, None, MachineState.MIGRATING_OUT, "out"),
        ("stopped", Phase.UNDECIDED, None, MachineState.MIGRATING_OUT, "out"),
        ("stopped", Phase.POSTCOPY, None, MachineState.MOVED, "out"),
        ("stopped", Phase.COMPLETED, None, MachineState.MOVED, "out"),
        ("running", Phase.FAILED, None, MachineState.RUNNING, ""),
        ("running", Phase.CANCELLED, None, MachineState.RUNNING, ""),
        ("incoming", None, None, MachineState.INCOMING, ""),
        ("prepared", None, Outcome.PREPARED, MachineState.MIGRATING_IN, "in"),
        ("loaded", None, Outcome.READY, MachineState.MIGRATING_IN, "in"),
        ("running", None, Outcome.RUNNING, MachineState.MIGRATING_IN, "in"),
        ("running", None, Outcome.COMPLETED, MachineState.RUNNING, ""),
        ("running", None, Outcome.REFUSED, MachineState.RUNNING, ""),
    ],
)
def test_state(state: str, phase: Phase | None, outcome: Outcome | None, shown: MachineState, migration: str) -> None:
    jobs = [Job("out", "web", "h:1", phase)] if phase else []
    incomings = [Incoming("in", "web", "h", outcome, "", PageProgress(total=7))] if outcome else []
    machine = only(machines([vmm(state)], jobs, incomings, {"web": 3}))
    assert (machine.state, machine.migration, machine.memory_errors) == (shown, migration, 3)
    assert (machine.progress is not None) is (migration == "in")


def test_the_newest_job_counts() -> None:
    jobs = [
        Job("new", "web", "h:1", Phase.PREPARING, created_us=2),
        Job("old", "web", "h:1", Phase.FAILED, created_us=1),
    ]
    assert only(machines([vmm("running")], jobs, [], {})).migration == "new"


def test_a_move_within_one_host_has_both() -> None:
    jobs = [Job("m", "web", "h:1", Phase.POSTCOPY)]
    incomings = [Incoming("m", "web", "h", Outcome.RUNNING)]
    found = machines([vmm("running", 2), vmm("stopped", 1)], jobs, incomings, {})
    assert [(m.vmm_pid, m.state) for m in found] == [(1, MachineState.MOVED), (2, MachineState.MIGRATING_IN)]


@pytest.mark.parametrize(
    ("phase", "shown"), [(Phase.PREPARING, MachineState.DISCONNECTED), (Phase.POSTCOPY, MachineState.MOVED)]
)
def test_a_move_whose_vmm_is_not_connected_is_shown(phase: Phase, shown: MachineState) -> None:
    machine = only(machines([], [Job("m", "web", "h:1", phase)], [], {}))
    assert (machine.vm, machine.state, machine.vmm_pid) == ("web", shown, 0)


def test_an_arrival_whose_vmm_is_not_connected_is_shown() -> None:
    assert only(machines([], [], [Incoming("m", "web", "h", Outcome.RUNNING)], {})).state is MachineState.DISCONNECTED


def test_what_has_ended_is_not_shown_without_its_vmm() -> None:
    assert (
        machines([], [Job("m", "web", "h:1", Phase.COMPLETED)], [Incoming("n", "db", "h", Outcome.REFUSED)], {}) == []
    )
