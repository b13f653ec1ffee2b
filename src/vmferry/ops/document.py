"""The state as one JSON document, for /api/v1/state, the event stream and the page.

Addresses are hexadecimal text, sizes bytes, times Unix microseconds, so that a JavaScript number loses nothing. No
value grows with the clock: readers count from the times.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmferry.model.facts import Direction, MoveFacts
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Latency, PageProgress
from vmferry.model.problems import Problem, command_for, runbook
from vmferry.ops.state import EventView, MachineView, State

ERRORS_SHOWN = 500
"""The most memory errors shown of a VM, the newest first. `memory_errors` counts all."""

Document = dict[str, object]


def render(state: State, version: str) -> Document:
    """Builds the document."""
    moves = sorted(state.moving, key=lambda facts: (facts.phase_since_us, facts.migration)) + list(state.ended)
    return {
        "host": state.host,
        "version": version,
        "at_us": state.at_us,
        "problems": [problem_document(problem) for problem in state.problems],
        "machines": [_machine(machine, state.ledgers.get(machine.vm, ())) for machine in state.machines],
        "migrations": _of(moves, Direction.OUT),
        "incoming": _of(moves, Direction.IN),
        "migrations_not_shown": max(0, state.ended_count - len(state.ended)),
        "ledgers": [
            {"vm": vm, "memory_errors": len(errors), "errors": [_error(error) for error in _newest(errors)]}
            for vm, errors in sorted(state.ledgers.items())
            if errors
        ],
        "events": [_event(event) for event in state.events],
    }


def _of(moves: Iterable[MoveFacts], direction: Direction) -> list[Document]:
    return [move_document(facts) for facts in moves if facts.direction is direction]


def problem_document(problem: Problem) -> Document:
    """One problem, for /api/v1/problems too."""
    return {
        "weight": str(problem.weight),
        "reason_code": problem.reason_code,
        "vm": problem.vm,
        "migration": problem.migration,
        "host": problem.host,
        "effect": problem.effect,
        "cause": problem.cause,
        "since_us": problem.since_us,
        "command": problem.command,
        "runbook": problem.runbook,
    }


def move_document(facts: MoveFacts) -> Document:
    """The facts of one migration, for /api/v1/migrations/ID too."""
    return {
        "migration": facts.migration,
        "vm": facts.vm,
        "direction": str(facts.direction),
        "source_host": facts.source_host,
        "destination_host": facts.destination_host,
        "destination": facts.destination,
        "phase": str(facts.phase),
        "phase_since_us": facts.phase_since_us,
        "ended": facts.ended,
        "reason_code": facts.reason_code,
        "reason": facts.reason,
        "command": command_for(facts) if facts.reason_code else "",
        "runbook": runbook(facts.reason_code) if facts.reason_code else "",
        "revision": facts.revision,
        "requested_by": facts.requested_by,
        "created_us": facts.created_us,
        "updated_us": facts.updated_us,
        "ended_us": facts.ended_us,
        "downtime_s": facts.downtime_s,
        "total_s": facts.total_s if facts.ended else 0.0,
        "memory_errors": facts.memory_errors,
        "push_bytes_per_s": facts.push_bytes_per_s,
        "phases": [
            {
                "phase": str(span.phase),
                "since_us": span.since_us,
                "duration_s": 0.0 if span is facts.spans[-1] else span.duration_s,
            }
            for span in facts.spans
        ],
        "blackout": [{"name": part.name, "duration_s": part.duration_s} for part in facts.blackout],
        "steps": [
            {"what": step.what, "host": step.host, "since_us": step.since_us, "until_us": step.until_us}
            for step in facts.steps
        ],
        "pagers": [
            {
                "host": pager.host,
                "role": pager.role,
                "pid": pager.pid,
                "alive": pager.alive,
                "exit": pager.exit,
                "ended_us": pager.ended_us,
                "cpu_s": pager.cpu_s,
                "memory_bytes": pager.memory_bytes,
            }
            for pager in facts.pagers
        ],
        "events": [
            {"at_us": one.at_us, "host": one.host, "kind": one.kind, "detail": one.words} for one in facts.events
        ],
        "progress": _progress(facts.progress),
    }


def _machine(machine: MachineView, errors: tuple[LedgerEntry, ...]) -> Document:
    return {
        "vm": machine.vm,
        "state": machine.state,
        "vcpus": machine.vcpus,
        "platform": machine.platform,
        "memory_bytes": machine.memory_bytes,
        "vmm_pid": machine.vmm_pid,
        "migration": machine.migration,
        "memory_errors": len(errors),
        "progress": _progress(machine.progress) if machine.progress else None,
    }


def _progress(progress: PageProgress) -> Document:
    return {
        "total": progress.total,
        "arrived": progress.arrived,
        "absent": progress.absent,
        "demand": progress.demand,
        "push": progress.push,
        "zero": progress.zero,
        "poison": progress.poison,
        "discarded": progress.discarded,
        "bytes_received": progress.bytes_received,
        "faults": progress.faults,
        "duplicate_faults": progress.duplicate_faults,
        "machine_checks": progress.machine_checks,
        "waiting_faults": progress.waiting_faults,
        "oldest_fault_since_us": progress.oldest_fault_since_us,
        "last_page_us": progress.last_page_us,
        "rate_bytes_s": progress.rate_bytes_per_s,
        "remaining_s": progress.remaining_s,
        "first_touch": _latency(progress.first_touch),
        "recent_first_touch": _latency(progress.recent_first_touch),
    }


def _latency(touch: Latency) -> Document:
    return {
        "count": touch.count,
        "p50_us": touch.p50_us,
        "p90_us": touch.p90_us,
        "p99_us": touch.p99_us,
        "max_us": touch.max_us,
        "buckets": list(touch.buckets),
    }


def _newest(errors: tuple[LedgerEntry, ...]) -> list[LedgerEntry]:
    return sorted(errors, key=lambda error: (-error.last_seen_us, error.gpa))[:ERRORS_SHOWN]


def _error(error: LedgerEntry) -> Document:
    return {
        "gpa": f"{error.gpa:#x}",
        "size_bytes": 1 << error.lsb,
        "origin": str(error.origin),
        "severity": str(error.severity or ""),
        "guest_visible": error.guest_visible,
        "hop": error.hop,
        "count": error.count,
        "first_seen_us": error.first_seen_us,
        "last_seen_us": error.last_seen_us,
    }


def _event(event: EventView) -> Document:
    return {
        "at_us": event.at_us,
        "migration": event.migration,
        "host": event.host,
        "kind": event.kind,
        "detail": event.detail,
    }
