"""Facts, problems and machines as the control plane's protobuf messages."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from vmferry.migration.inventory import Machine, MachineState
from vmferry.model.facts import Direction, MoveFacts
from vmferry.model.migration import Phase
from vmferry.model.problems import Problem, command_for, runbook
from vmferry.model.vocabulary import Weight
from vmferry.rpc import convert as wire
from vmferry.v1 import machines_pb2, migrations_pb2, problems_pb2

PHASES: dict[Phase, migrations_pb2.Phase.ValueType] = {
    phase: migrations_pb2.Phase.Value(f"PHASE_{phase.value}") for phase in Phase
}
STATES: dict[MachineState, machines_pb2.MachineState.ValueType] = {
    state: machines_pb2.MachineState.Value(f"MACHINE_STATE_{state.value}") for state in MachineState
}
DIRECTIONS: dict[Direction, migrations_pb2.Direction.ValueType] = {
    direction: migrations_pb2.Direction.Value(f"DIRECTION_{direction.value}") for direction in Direction
}
WEIGHTS: dict[Weight, problems_pb2.ProblemWeight.ValueType] = {
    weight: problems_pb2.ProblemWeight.Value(f"PROBLEM_WEIGHT_{weight.name}") for weight in Weight
}


def direction_from_pb(number: migrations_pb2.Direction.ValueType) -> Direction | None:
    """The direction. None: unspecified, or of another version."""
    return next((direction for direction, value in DIRECTIONS.items() if value == number), None)


def facts_to_pb(facts: MoveFacts) -> migrations_pb2.Migration:
    message = migrations_pb2.Migration(
        migration_id=facts.migration,
        vm=facts.vm,
        destination=facts.destination,
        phase=PHASES[facts.phase],
        reason_code=facts.reason_code,
        reason=facts.reason,
        revision=facts.revision,
        create_time=_time(facts.created_us),
        update_time=_time(facts.updated_us),
        end_time=_time(facts.ended_us) if facts.ended_us else None,
        downtime_s=facts.downtime_s,
        total_s=facts.total_s,
        progress=wire.progress_to_pb(facts.progress),
        memory_errors=facts.memory_errors,
        push_bytes_per_s=facts.push_bytes_per_s,
        direction=DIRECTIONS[facts.direction],
        source_host=facts.source_host,
        destination_host=facts.destination_host,
        phase_time=_time(facts.phase_since_us),
        requested_by=facts.requested_by,
    )
    _add_course(message, facts)
    if facts.reason_code:
        message.command = command_for(facts)
        message.runbook = runbook(facts.reason_code)
    return message


def _add_course(message: migrations_pb2.Migration, facts: MoveFacts) -> None:
    for span in facts.spans:
        message.phases.add(phase=PHASES[span.phase], start_time=_time(span.since_us), duration_s=span.duration_s)
    for part in facts.blackout:
        message.blackout.add(name=part.name, duration_s=part.duration_s)
    for step in facts.steps:
        message.steps.add(
            what=step.what, host=step.host, start_time=_time(step.since_us), deadline=_time(step.until_us)
        )
    for pager in facts.pagers:
        message.pagers.add(
            host=pager.host,
            role=pager.role,
            pid=pager.pid,
            alive=pager.alive,
            exit=pager.exit,
            end_time=_time(pager.ended_us) if pager.ended_us else None,
            cpu_s=pager.cpu_s,
            memory_bytes=pager.memory_bytes,
        )
    for event in facts.events:
        message.events.add(time=_time(event.at_us), host=event.host, kind=event.kind, words=event.words)


def problem_to_pb(problem: Problem) -> problems_pb2.Problem:
    return problems_pb2.Problem(
        weight=WEIGHTS[problem.weight],
        reason_code=problem.reason_code,
        vm=problem.vm,
        migration_id=problem.migration,
        host=problem.host,
        effect=problem.effect,
        cause=problem.cause,
        start_time=_time(problem.since_us),
        command=problem.command,
        runbook=problem.runbook,
    )


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


def _time(at_us: int) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(at_us)
    return stamp
