"""`peer.proto`'s own messages ⇄ the model. `rpc/convert.py` has the shared messages."""

from __future__ import annotations

from vmferry.model.incoming import IncomingUpdate
from vmferry.model.migration import Outcome
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
