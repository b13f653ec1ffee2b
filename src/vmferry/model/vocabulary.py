"""The one vocabulary of states: phase ↔ severity ↔ VM here and there ↔ log level. Pure.

docs/reference/states.md is this table in words; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.model.migration import Incoming, Outcome, Phase


class Level(StrEnum):
    """The level of the log line that reports a phase."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Weight(StrEnum):
    """The weight of a problem. The worst comes first."""

    LOST = "lost"
    """A guest is gone."""
    HURT = "hurt"
    """A guest is frozen, or nobody knows where it runs."""
    SLOW = "slow"
    """A step or a page takes too long; nothing is lost."""
    FAILED = "failed"
    """A migration ended early. Its guest runs on its source."""
    HOST = "host"
    """This host cannot do its work."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """The meaning of a phase on both hosts. `source_vm` and `destination_vm` are states of `MachineState`."""

    words: str
    level: Level
    source_vm: str
    destination_vm: str
    problem: Weight | None = None


MEANING: dict[Phase, Meaning] = {
    Phase.QUEUED: Meaning("waits to begin", Level.INFO, "MIGRATING_OUT", "INCOMING"),
    Phase.PREPARING: Meaning("prepares, the VM runs on its source", Level.INFO, "MIGRATING_OUT", "MIGRATING_IN"),
    Phase.SWITCHOVER: Meaning("switches over, the VM is stopped", Level.INFO, "MIGRATING_OUT", "MIGRATING_IN"),
    Phase.UNDECIDED: Meaning(
        "nobody knows yet on which host the VM runs", Level.ERROR, "MIGRATING_OUT", "MIGRATING_IN", Weight.HURT
    ),
    Phase.POSTCOPY: Meaning("runs on its destination, memory arrives", Level.INFO, "MOVED", "MIGRATING_IN"),
    Phase.POSTCOPY_PAUSED: Meaning(
        "runs on its destination, memory has stopped arriving", Level.ERROR, "MOVED", "MIGRATING_IN", Weight.HURT
    ),
    Phase.COMPLETED: Meaning("runs on its destination", Level.INFO, "–", "RUNNING"),  # noqa: RUF001 - none is there
    Phase.CANCELLED: Meaning("cancelled, the VM runs on its source", Level.INFO, "RUNNING", "INCOMING"),
    Phase.FAILED: Meaning("failed, the VM runs on its source", Level.WARNING, "RUNNING", "INCOMING", Weight.FAILED),
    Phase.LOST: Meaning("the VM is lost", Level.ERROR, "MOVED", "DISCONNECTED", Weight.LOST),
}


def phase_of(incoming: Incoming) -> Phase:
    """The phase of an incoming migration, in the words of its source."""
    if incoming.lost_reason:
        return Phase.LOST
    match incoming.outcome:
        case Outcome.UNKNOWN | Outcome.PREPARED:
            return Phase.PREPARING
        case Outcome.RUNNING:
            return Phase.POSTCOPY_PAUSED if incoming.paused_reason else Phase.POSTCOPY
        case Outcome.COMPLETED:
            return Phase.COMPLETED
        case Outcome.REFUSED:
            return Phase.FAILED
