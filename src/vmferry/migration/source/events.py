"""What can happen to a job on its source: the events of `state_machine.py`. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.errors import Reason
from vmferry.model.migration import Outcome


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The job's turn has come."""


@dataclass(frozen=True, slots=True)
class DestinationPrepared:
    """Both pagers and the destination's VMM stand ready."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The commit is in the journal, and the destination holds all that it needs to run the VM."""


@dataclass(frozen=True, slots=True)
class Started:
    """The destination answered Start. `started_us`: its clock, Unix microseconds."""

    started_us: int


@dataclass(frozen=True, slots=True)
class StartUnanswered:
    """After the commit, no answer within the deadline."""

    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeReceived:
    """The destination's journal spoke."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DestinationReported:
    """The destination reported. `paused_reason`: why its link is down, empty while it is up."""

    paused_reason: str


@dataclass(frozen=True, slots=True)
class DestinationSilent:
    """The destination's daemon does not answer during postcopy; pagers go on without it."""

    reason: str


@dataclass(frozen=True, slots=True)
class DestinationCompleted:
    """All pages are there."""


@dataclass(frozen=True, slots=True)
class DestinationDied:
    """The VM's process died on the destination after it ran there."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceReleased:
    """The source's VMM and pager are gone."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The operator, or a daemon that stops, asks for the VM back. `code` says which."""

    code: Reason = Reason.CANCELLED
    reason: str = "cancelled on request"


@dataclass(frozen=True, slots=True)
class Failed:
    """A step before the commit failed."""

    code: Reason
    reason: str


@dataclass(frozen=True, slots=True)
class Restored:
    """The VM runs on the source again."""


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """The VM could not be resumed on the source: its VMM is gone."""

    code: Reason
    reason: str


Event: TypeAlias = (
    JobStarted
    | DestinationPrepared
    | HandedOver
    | Started
    | StartUnanswered
    | OutcomeReceived
    | DestinationReported
    | DestinationSilent
    | DestinationCompleted
    | DestinationDied
    | SourceReleased
    | CancelRequested
    | Failed
    | Restored
    | RestoreFailed
)
