"""The VMs that a daemon knows, from its connected VMMs and its active migrations. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmferry.model.memory import MemoryLayout
from vmferry.model.migration import TERMINAL, Incoming, Job, Outcome, PageProgress, Phase
from vmferry.model.vmm import VmmIdentity


class MachineState(StrEnum):
    """`MachineState` of machines.proto, without its prefix."""

    RUNNING = "RUNNING"
    INCOMING = "INCOMING"
    MIGRATING_OUT = "MIGRATING_OUT"
    MIGRATING_IN = "MIGRATING_IN"
    MOVED = "MOVED"
    DISCONNECTED = "DISCONNECTED"


@dataclass(frozen=True, slots=True)
class Machine:
    """A VM that this daemon knows. `layout` is empty while the VM has no memory. Only an incoming VM has `progress`."""

    vm: str
    state: MachineState
    layout: MemoryLayout
    vcpus: int
    platform: str
    memory_errors: int
    migration: str
    vmm_pid: int
    progress: PageProgress | None


def machines(
    identities: Sequence[VmmIdentity],
    jobs: Sequence[Job],
    incomings: Sequence[Incoming],
    known_errors: Mapping[str, int],
) -> list[Machine]:
    """One entry per VM, by name. Of two VMMs of one VM (a move within the host) it shows the running one."""
    leaving = {job.vm: job for job in jobs if job.phase not in TERMINAL}
    arriving = {record.vm: record for record in incomings if record.vm and _under_way(record)}
    best: dict[str, VmmIdentity] = {}
    for identity in sorted(identities, key=_rank, reverse=True):
        best[identity.vm] = identity
    found = [
        _connected(identity, leaving.get(vm), arriving.get(vm), known_errors.get(vm, 0))
        for vm, identity in best.items()
    ]
    for vm in (leaving.keys() | arriving.keys()) - best.keys():
        found.append(_disconnected(vm, leaving.get(vm), arriving.get(vm), known_errors.get(vm, 0)))
    return sorted(found, key=lambda machine: machine.vm)


def _connected(identity: VmmIdentity, job: Job | None, incoming: Incoming | None, errors: int) -> Machine:
    match identity.state:
        case "running":
            state = MachineState.RUNNING
            state = MachineState.MIGRATING_OUT if job else state
            state = MachineState.MIGRATING_IN if incoming and incoming.outcome is Outcome.RUNNING else state
        case "stopped":
            before = job is not None and job.phase in (Phase.PREPARING, Phase.SWITCHOVER, Phase.UNDECIDED)
            state = MachineState.MIGRATING_OUT if before else MachineState.MOVED
        case "prepared" | "loaded":
            state = MachineState.MIGRATING_IN
        case _:
            state = MachineState.MIGRATING_IN if incoming else MachineState.INCOMING
    inward = state is MachineState.MIGRATING_IN and incoming is not None
    return Machine(
        vm=identity.vm,
        state=state,
        layout=identity.layout,
        vcpus=identity.vcpus,
        platform=identity.platform,
        memory_errors=errors,
        migration=_migration(job, incoming),
        vmm_pid=identity.pid,
        progress=incoming.progress if inward and incoming else None,
    )


def _disconnected(vm: str, job: Job | None, incoming: Incoming | None, errors: int) -> Machine:
    nothing = MemoryLayout(())
    migration = _migration(job, incoming)
    return Machine(vm, MachineState.DISCONNECTED, nothing, 0, "", errors, migration, 0, None)


def _migration(job: Job | None, incoming: Incoming | None) -> str:
    if incoming is not None:
        return incoming.migration
    return job.migration if job is not None else ""


def _under_way(record: Incoming) -> bool:
    return record.outcome not in (Outcome.COMPLETED, Outcome.REFUSED) and not record.lost_reason


def _rank(identity: VmmIdentity) -> int:
    order = ("running", "stopped", "loaded", "prepared", "incoming")
    return order.index(identity.state) if identity.state in order else len(order)
