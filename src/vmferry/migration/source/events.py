"""The events of a job on its source, for `state_machine.py`. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vmferry.errors import Reason
from vmferry.model.migration import Outcome


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The job starts."""


@dataclass(frozen=True, slots=True)
class DestinationPrepared:
    """Both pagers and the destination's VMM are ready."""


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The commit is in the journal, and the destination holds everything to run the VM."""


@dataclass(frozen=True, slots=True)
class Started:
    """The destination answered Start. `started_us`: by its clock, Unix microseconds."""

    started_us: int


@dataclass(frozen=True, slots=True)
class StartUnanswered:
    """The destination did not answer Start within the deadline."""

    reason: str


@dataclass(frozen=True, slots=True)
class OutcomeReceived:
    """The destination's journal gave the outcome."""

    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DestinationReported:
    """The destination reported. `paused_reason` is the cause of a broken link, empty while the link is up."""

    paused_reason: str


@dataclass(frozen=True, slots=True)
class DestinationSilent:
    """The destination's daemon does not answer during postcopy. The pagers work without it."""

    reason: str


@dataclass(frozen=True, slots=True)
class DestinationCompleted:
    """The destination has all pages."""


@dataclass(frozen=True, slots=True)
class DestinationDied:
    """The VM's process died on the destination after it ran there."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceReleased:
    """The source's VMM and pager have ended."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """The operator, or a stopping daemon, wants the VM back. `code` tells which."""

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
    """The VM could not be resumed on the source."""

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
