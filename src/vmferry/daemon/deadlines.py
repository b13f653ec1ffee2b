"""The configured time-outs as the deadlines of each call. The factors stand in docs/reference/configuration.md."""

from __future__ import annotations

from vmferry.daemon.config import Timeouts
from vmferry.migration import timeouts as core
from vmferry.pager.settings import PagerDeadlines
from vmferry.peer.client import PeerDeadlines
from vmferry.peer.contract import MESSAGE_LIMIT, transfer_s
from vmferry.vmm.session import VmmDeadlines

LONGER = 3.0
"""The factor for calls that move data: a device state, a journal and its clean-up."""
LONGEST = 6.0
"""The factor for calls that make a guest's memory or load its state."""


def migration(limits: Timeouts) -> core.Timeouts:
    """Of the core itself: a VMM whose connection broke has as long to come back as for any answer. A step before the
    commit is at most one call of each partner, and its own deadlines come first."""
    step_s = limits.attach_s + LONGEST * (limits.vmm_s + limits.pager_s + limits.peer_s) + transfer_s(MESSAGE_LIMIT)
    return core.Timeouts(
        step_s=step_s,
        downtime_s=limits.downtime_s,
        stop_s=limits.stop_s,
        vmm_return_s=limits.vmm_s,
        start_s=limits.peer_s,
        refuse_s=limits.peer_s,
    )


def vmm(limits: Timeouts) -> VmmDeadlines:
    short = limits.vmm_s
    return VmmDeadlines(
        hello_s=short,
        attach_memory_s=limits.attach_s,
        stop_s=short,
        save_state_s=LONGER * short,
        resume_s=short,
        abandon_s=short,
        prepare_s=LONGEST * short,
        load_state_s=LONGEST * short,
        start_s=short,
        migration_complete_s=short,
        reset_s=LONGER * short,
    )


def pager(limits: Timeouts) -> PagerDeadlines:
    return PagerDeadlines(call_s=limits.pager_s, connect_s=LONGER * limits.pager_s, complete_s=LONGEST * limits.pager_s)


def peer(limits: Timeouts) -> PeerDeadlines:
    short = limits.peer_s
    return PeerDeadlines(
        hello_s=short,
        prepare_s=LONGEST * short,
        ready_s=LONGEST * short,
        start_s=LONGER * short,
        refuse_s=LONGER * short,
        outcome_s=short,
        finish_s=LONGER * short,
    )
