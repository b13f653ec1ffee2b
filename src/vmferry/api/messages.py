"""Jobs and machines as the control plane's protobuf messages."""

from __future__ import annotations

from vmferry.migration.inventory import Machine, MachineState
from vmferry.model.migration import Job, Phase
from vmferry.rpc import convert as wire
from vmferry.v1 import machines_pb2, migrations_pb2

PHASES: dict[Phase, migrations_pb2.Phase.ValueType] = {
    phase: migrations_pb2.Phase.Value(f"PHASE_{phase.value}") for phase in Phase
}
STATES: dict[MachineState, machines_pb2.MachineState.ValueType] = {
    state: machines_pb2.MachineState.Value(f"MACHINE_STATE_{state.value}") for state in MachineState
}


def job_to_pb(job: Job, now_us: int) -> migrations_pb2.Migration:
    """The job as a message. `now_us` (Unix microseconds) ends the `total_s` of a running job."""
    message = migrations_pb2.Migration(
        migration_id=job.migration,
        vm=job.vm,
        destination=job.destination,
        phase=PHASES[job.phase],
        reason_code=str(job.reason_code or ""),
        reason=job.reason,
        revision=job.revision,
        downtime_s=job.downtime_s,
        total_s=job.age_s(now_us),
        progress=wire.progress_to_pb(job.progress),
        memory_errors=job.memory_errors,
        push_bytes_per_s=job.push_bytes_per_s,
    )
    message.create_time.FromMicroseconds(job.created_us)
    message.update_time.FromMicroseconds(job.updated_us)
    if job.ended_us:
        message.end_time.FromMicroseconds(job.ended_us)
    return message


def machine_to_pb(machine: Machine) -> machines_pb2.Machine:
    return machines_pb2.Machine(
        vm=machine.vm,
        state=STATES[machine.state],
        layout=wire.layout_to_pb(machine.layout),
        vcpus=machine.vcpus,
        platform=machine.platform,
        memory_errors=machine.memory_errors,
        migration_id=machine.migration,
        vmm_pid=machine.vmm_pid,
        progress=wire.progress_to_pb(machine.progress) if machine.progress else None,
    )
