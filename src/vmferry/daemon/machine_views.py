"""Which VMs this host has, and in what state: derived anew from VMMs, jobs and arrivals each time it is asked. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmferry.api.control import Machine, MachineState
from vmferry.migration.model import (
    BEFORE_NO_RETURN,
    TERMINAL,
    Incoming,
    Job,
    MemoryLayout,
    Outcome,
    Phase,
    VmmIdentity,
)

UNDER_WAY_IN = frozenset({Outcome.PREPARED, Outcome.READY, Outcome.RUNNING})
_NO_LAYOUT = MemoryLayout(())


def machines(
    vmms: Sequence[VmmIdentity], jobs: Sequence[Job], incomings: Sequence[Incoming], errors: Mapping[str, int]
) -> list[Machine]:
    """One entry a connected VMM, and one a VM that moves though its VMM is not connected. `errors` counts by VM."""
    newest = {job.vm: job for job in sorted(jobs, key=lambda job: job.created_us)}
    arriving = {incoming.vm: incoming for incoming in incomings if incoming.outcome in UNDER_WAY_IN}
    found = [_connected(vmm, newest.get(vmm.vm), arriving.get(vmm.vm), errors.get(vmm.vm, 0)) for vmm in vmms]
    seen = {machine.vm for machine in found}
    moving = {job.vm: job.migration for job in newest.values() if job.phase not in TERMINAL}
    moving |= {incoming.vm: incoming.migration for incoming in arriving.values()}
    found += [_away(vm, moving[vm], newest.get(vm), errors.get(vm, 0)) for vm in sorted(moving.keys() - seen)]
    return sorted(found, key=lambda machine: (machine.vm, machine.vmm_pid))


def _connected(vmm: VmmIdentity, job: Job | None, incoming: Incoming | None, errors: int) -> Machine:
    state = _state(vmm.state, job, incoming)
    arrives = state is MachineState.MIGRATING_IN
    migration = ""
    if arrives and incoming is not None:
        migration = incoming.migration
    elif state in (MachineState.MIGRATING_OUT, MachineState.MOVED) and job is not None:
        migration = job.migration
    return Machine(
        vm=vmm.vm,
        state=state,
        layout=vmm.layout,
        vcpus=vmm.vcpus,
        platform=vmm.platform,
        memory_errors=errors,
        migration=migration,
        vmm_pid=vmm.pid,
        progress=incoming.progress if arrives and incoming is not None else None,
    )


def _state(vmm: str, job: Job | None, incoming: Incoming | None) -> MachineState:
    """`vmm` is the state of `hello`. The vCPUs decide: of a move within one host the VMM that runs after the commit is
    the destination's, the one that stands still the source's."""
    gone = job is not None and job.phase not in (*BEFORE_NO_RETURN, Phase.CANCELLED, Phase.FAILED, Phase.UNDECIDED)
    leaves = job is not None and job.phase not in TERMINAL
    match vmm:
        case "incoming":
            return MachineState.INCOMING
        case "prepared" | "loaded":
            return MachineState.MIGRATING_IN
        case "stopped" if gone:
            return MachineState.MOVED
        case "running" if incoming is not None and incoming.outcome is Outcome.RUNNING:
            return MachineState.MIGRATING_IN
        case _:
            return MachineState.MIGRATING_OUT if leaves else MachineState.RUNNING


def _away(vm: str, migration: str, job: Job | None, errors: int) -> Machine:
    state = MachineState.DISCONNECTED
    if job is not None and job.migration == migration and job.phase in (Phase.POSTCOPY, Phase.POSTCOPY_PAUSED):
        state = MachineState.MOVED
    return Machine(vm, state, _NO_LAYOUT, 0, "", errors, migration, 0, None)
