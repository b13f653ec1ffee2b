"""The state as one JSON document, for /api/state, the event stream and the page.

Addresses are hexadecimal text, sizes bytes, times Unix microseconds, so that a JavaScript number loses nothing.
"""

from __future__ import annotations

from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import TERMINAL, Incoming, Job, Outcome, PageProgress
from vmferry.ops.rate import Rates
from vmferry.ops.state import EventView, MachineView, State

MIGRATIONS_SHOWN = 100
ERRORS_SHOWN = 500
"""The most memory errors shown of a VM, the newest first. `memory_errors` counts all."""

Document = dict[str, object]


def render(state: State, rates: Rates, now_s: float, version: str) -> Document:
    """Builds the document. `now_s` is the monotonic time of the rates."""
    newest_first = state.jobs[::-1]
    jobs = sorted(newest_first, key=lambda job: job.phase in TERMINAL)
    document: Document = {
        "host": state.host,
        "version": version,
        "at_us": state.at_us,
        "machines": [_machine(machine, state.ledgers.get(machine.vm, ())) for machine in state.machines],
        "migrations": [_job(job, rates, now_s, state.at_us) for job in jobs[:MIGRATIONS_SHOWN]],
        "migrations_not_shown": max(0, len(jobs) - MIGRATIONS_SHOWN),
        "incoming": [_incoming(incoming, rates, now_s) for incoming in state.incomings[:MIGRATIONS_SHOWN]],
        "ledgers": [
            {"vm": vm, "memory_errors": len(errors), "errors": [_error(error) for error in _newest(errors)]}
            for vm, errors in sorted(state.ledgers.items())
            if errors
        ],
        "events": [_event(event) for event in state.events],
    }
    rates.keep({f"out/{job.migration}" for job in state.jobs} | {f"in/{i.migration}" for i in state.incomings})
    return document


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


def _job(job: Job, rates: Rates, now_s: float, now_us: int) -> Document:
    return {
        "migration": job.migration,
        "vm": job.vm,
        "destination": job.destination,
        "phase": str(job.phase),
        "ended": job.phase in TERMINAL,
        "reason_code": str(job.reason_code or ""),
        "reason": job.reason,
        "revision": job.revision,
        "created_us": job.created_us,
        "updated_us": job.updated_us,
        "ended_us": job.ended_us,
        "downtime_s": job.downtime_s,
        "total_s": job.age_s(now_us),
        "memory_errors": job.memory_errors,
        "push_bytes_per_s": job.push_bytes_per_s,
        "rate_bytes_s": 0.0
        if job.phase in TERMINAL
        else rates.observe(f"out/{job.migration}", job.progress.bytes_received, now_s),
        "progress": _progress(job.progress),
    }


def _incoming(incoming: Incoming, rates: Rates, now_s: float) -> Document:
    ended = incoming.outcome in (Outcome.COMPLETED, Outcome.REFUSED) or bool(incoming.lost_reason)
    return {
        "migration": incoming.migration,
        "vm": incoming.vm,
        "source_host": incoming.source_host,
        "outcome": str(incoming.outcome),
        "ended": ended,
        "reason": incoming.lost_reason or incoming.paused_reason or incoming.reason,
        "lost": bool(incoming.lost_reason),
        "rate_bytes_s": 0.0
        if ended
        else rates.observe(f"in/{incoming.migration}", incoming.progress.bytes_received, now_s),
        "progress": _progress(incoming.progress),
    }


def _progress(progress: PageProgress) -> Document:
    touch = progress.first_touch
    return {
        "total": progress.total,
        "arrived": max(0, progress.total - progress.absent),
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
        "first_touch": {
            "count": touch.count,
            "p50_us": touch.p50_us,
            "p90_us": touch.p90_us,
            "p99_us": touch.p99_us,
            "max_us": touch.max_us,
        },
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
    return {"at_us": event.at_us, "migration": event.migration, "kind": event.kind, "detail": event.detail}
