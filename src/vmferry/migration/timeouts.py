"""The longest waits of a migration, seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The deadlines and pauses of one daemon's migrations, seconds."""

    step_s: float = 90.0
    """One step before the commit. It is longer than the adapters' own deadlines, which name the cause better."""
    downtime_s: float = 1.0
    """The blackout before the commit, from the request to stop. Longer, and the VM runs here again."""
    start_s: float = 10.0
    """After the commit, Start is repeated this long. The job then shows UNDECIDED and asks for the outcome."""
    vmm_return_s: float = 15.0
    """A VMM that has not connected again within this time counts as dead. It tries every 0.2 s."""
    refuse_s: float = 10.0
    """One attempt to make the destination refuse."""
    refuse_attempts: int = 20
    """Attempts in the background, with back-off."""
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0
    progress_s: float = 0.2
    """The pause between two polls of a pager's progress."""
    stop_s: float = 30.0
    """A graceful stop waits this long for jobs past the point of no return."""
