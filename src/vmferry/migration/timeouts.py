"""The longest waits of a migration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Longest waits, seconds."""

    step_s: float = 90.0
    """One step before the commit. Above the adapters' own deadlines, which name the cause better."""
    start_s: float = 10.0
    """After the commit: how long Start is repeated before the job shows UNDECIDED. It goes on after that."""
    vmm_return_s: float = 15.0
    """For a VMM to connect again (it tries every 0.2 s) before it counts as dead."""
    refuse_s: float = 10.0
    """One attempt to make the destination refuse."""
    refuse_attempts: int = 20
    """Attempts in the background, with back-off."""
    backoff_first_s: float = 0.05
    backoff_max_s: float = 5.0
    progress_s: float = 0.2
    """Between two looks at a pager's progress."""
    stop_s: float = 30.0
    """Graceful stop: how long jobs past the point of no return are waited for."""
