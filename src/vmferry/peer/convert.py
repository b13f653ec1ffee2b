"""`peer.proto`'s own messages ⇄ the model. `rpc/convert.py` has the shared messages."""

from __future__ import annotations

from vmferry.model.facts import Event, HostFacts, PagerFacts, Step
from vmferry.model.incoming import IncomingUpdate
from vmferry.model.migration import Outcome, Phase
from vmferry.rpc import convert as wire
from vmferry.v1 import peer_pb2 as pb

_OUTCOME_TO_PB = {
    Outcome.UNKNOWN: pb.OUTCOME_UNKNOWN,
    Outcome.PREPARED: pb.OUTCOME_PREPARED,
    Outcome.RUNNING: pb.OUTCOME_RUNNING,
    Outcome.COMPLETED: pb.OUTCOME_COMPLETED,
    Outcome.REFUSED: pb.OUTCOME_REFUSED,
}
_OUTCOME_FROM_PB = {number: outcome for outcome, number in _OUTCOME_TO_PB.items()}


def outcome_to_pb(outcome: Outcome) -> pb.Outcome.ValueType:
    return _OUTCOME_TO_PB[outcome]


def outcome_from_pb(number: pb.Outcome.ValueType) -> Outcome | None:
    """Converts an outcome. None: this version does not know it."""
    return _OUTCOME_FROM_PB.get(number)


def update_to_pb(update: IncomingUpdate) -> pb.IncomingUpdate:
    return pb.IncomingUpdate(
        outcome=outcome_to_pb(update.outcome),
        progress=wire.progress_to_pb(update.progress),
        paused_reason=update.paused_reason,
        lost_reason=update.lost_reason,
        errors=[wire.error_to_pb(entry) for entry in update.errors],
    )


def update_from_pb(message: pb.IncomingUpdate) -> IncomingUpdate | None:
    """Converts an update. None: this version does not know its outcome.

    Raises: VmferryError INVALID_ARGUMENT for a malformed memory error.
    """
    outcome = outcome_from_pb(message.outcome)
    if outcome is None:
        return None
    return IncomingUpdate(
        outcome=outcome,
        progress=wire.progress_from_pb(message.progress),
        paused_reason=message.paused_reason,
        lost_reason=message.lost_reason,
        errors=tuple(wire.error_from_pb(error, f"errors[{index}]") for index, error in enumerate(message.errors)),
    )


def facts_to_pb(facts: HostFacts) -> pb.HostFacts:
    step, pager = facts.step, facts.pager
    message = pb.HostFacts(
        host=facts.host,
        phase=facts.phase.value,
        phase_since_us=facts.phase_since_us,
        reason_code=facts.reason_code,
        reason=facts.reason,
        events=[
            pb.CourseEvent(host=one.host, number=one.number, at_us=one.at_us, kind=one.kind, words=one.words)
            for one in facts.events
        ],
        requested_by=facts.requested_by,
        at_us=facts.at_us,
    )
    if step is not None:
        message.step.MergeFrom(
            pb.WaitingStep(what=step.what, host=step.host, since_us=step.since_us, until_us=step.until_us)
        )
    if pager is not None:
        message.pager.MergeFrom(
            pb.PagerProcess(
                host=pager.host,
                role=pager.role,
                pid=pager.pid,
                alive=pager.alive,
                exit=pager.exit,
                ended_us=pager.ended_us,
                cpu_s=pager.cpu_s,
                memory_bytes=pager.memory_bytes,
            )
        )
    return message


def facts_from_pb(message: pb.HostFacts) -> HostFacts:
    """A phase of another version is taken as QUEUED: the facts are for people."""
    known = message.phase in Phase.__members__
    step, pager = message.step, message.pager
    return HostFacts(
        host=message.host,
        phase=Phase(message.phase) if known else Phase.QUEUED,
        phase_since_us=message.phase_since_us,
        reason_code=message.reason_code,
        reason=message.reason,
        step=Step(step.what, step.host, step.since_us, step.until_us) if message.HasField("step") else None,
        pager=PagerFacts(
            pager.host,
            pager.role,
            pager.pid,
            pager.alive,
            pager.exit,
            pager.ended_us,
            pager.cpu_s,
            pager.memory_bytes,
        )
        if message.HasField("pager")
        else None,
        events=tuple(Event(one.host, one.number, one.at_us, one.kind, one.words) for one in message.events),
        requested_by=message.requested_by,
        at_us=message.at_us,
    )
