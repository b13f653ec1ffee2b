"""All that is wrong on a host now, the worst first: pure, from the facts.

Each problem names the guest's pain, the cause with its host, one command line, and the section of the runbook.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vmferry.errors import Reason
from vmferry.model.facts import Direction, MoveFacts
from vmferry.model.migration import Phase
from vmferry.model.vocabulary import MEANING, Weight

RUNBOOK = "docs/reference/runbook.md"
ORDER = (Weight.LOST, Weight.HURT, Weight.SLOW, Weight.FAILED, Weight.HOST)
SLOW_STEP_US = 5_000_000
STALLED_US = 15_000_000
"""A vCPU that waits longer for one page hurts its guest."""
RECENT_US = 3_600_000_000
"""A failed or lost migration is a problem for an hour. Then it is history."""

COMMANDS: dict[str, str] = {
    Reason.PAGER_FAILED.value: "vmferry show {id}",
    Reason.LINK_DOWN.value: "vmferry show {id}",
    Reason.DESTINATION_UNREACHABLE.value: "vmferry doctor --to {destination}",
    Reason.UNDECIDED.value: "vmferry show {id}",
    Reason.DESTINATION_NO_VMM.value: "vmferry machines --api {destination_api}",
    Reason.KERNEL_LACKS_FEATURE.value: "vmferry doctor",
}
"""One command line for a reason; others: `vmferry show`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. `since_us`: Unix microseconds."""

    weight: Weight
    reason_code: str
    vm: str
    migration: str
    host: str
    effect: str
    cause: str
    since_us: int
    command: str
    runbook: str


@dataclass(frozen=True, slots=True)
class UnfitHost:
    """A check of readiness that has failed."""

    name: str
    detail: str


def runbook(reason_code: str) -> str:
    """The section of the runbook for a reason."""
    return f"{RUNBOOK}#{reason_code.lower()}"


def command_for(facts: MoveFacts) -> str:
    """One command line that helps with a migration, or shows more."""
    template = COMMANDS.get(facts.reason_code, "vmferry show {id}")
    host = facts.destination.rpartition(":")[0]
    if not host:
        template = "vmferry show {id}"
    return template.format(
        id=facts.migration, destination=facts.destination, destination_api=f"{host}:7600" if host else ""
    )


def problems(
    host: str, moves: Iterable[MoveFacts], unfit: Sequence[UnfitHost], since_us: int, now_us: int
) -> list[Problem]:
    """The problems of a host. `since_us`: the begin of its unfitness, if it is unfit."""
    found = [problem for facts in moves if (problem := _of_move(host, facts, now_us)) is not None]
    for one in unfit:
        code = _CHECK_REASONS.get(one.name, Reason.INTERNAL).value
        effect, cause = "new migrations cannot run", f"{one.name}: {one.detail}"
        made = Problem(Weight.HOST, code, "", "", host, effect, cause, since_us, "vmferry doctor", runbook(code))
        found.append(made)
    return sorted(found, key=lambda one: (ORDER.index(one.weight), one.since_us, one.migration))


_CHECK_REASONS = {
    "store": Reason.STORE_FAILED,
    "pager": Reason.PAGER_FAILED,
    "userfaultfd": Reason.KERNEL_LACKS_FEATURE,
    "vmm_socket": Reason.VMM_GONE,
}


def _of_move(host: str, facts: MoveFacts, now_us: int) -> Problem | None:
    weight = MEANING[facts.phase].problem
    if facts.ended and (weight is None or now_us - facts.ended_us > RECENT_US):
        return None
    if facts.ended and facts.direction is Direction.IN and facts.phase is not Phase.LOST:
        return None  # The source tells of a failure. On the destination nothing is wrong.
    if weight is not None:
        return _made(facts, weight, facts.reason or MEANING[facts.phase].words, facts.phase_since_us, host)
    return _slow(facts, host, now_us)


def _slow(facts: MoveFacts, host: str, now_us: int) -> Problem | None:
    """A migration under way that does not get on."""
    oldest_us = facts.progress.oldest_fault_since_us
    if oldest_us and now_us - oldest_us > STALLED_US:
        return _made(facts, Weight.HURT, "a page has not come, and the link counts as up", oldest_us, host)
    slow = [step for step in facts.steps if now_us - step.since_us > SLOW_STEP_US]
    if slow:
        # The other host's own word is the more exact one, and comes last.
        return _made(facts, Weight.SLOW, slow[-1].words(), slow[-1].since_us, slow[-1].host)
    if facts.reason_code == Reason.DESTINATION_UNREACHABLE.value:
        return _made(facts, Weight.SLOW, facts.reason, facts.updated_us, facts.other_host)
    return None


def _made(facts: MoveFacts, weight: Weight, cause: str, since_us: int, host: str) -> Problem:
    dead = next((pager.host for pager in facts.pagers if not pager.alive), "")
    stalled = weight is Weight.HURT and not facts.reason_code
    code = facts.reason_code or (Reason.LINK_DOWN if stalled else Reason.VMM_TIMEOUT).value
    return Problem(
        weight=weight,
        reason_code=code,
        vm=facts.vm,
        migration=facts.migration,
        host=dead or host,
        effect=_effect(facts, weight),
        cause=cause,
        since_us=since_us,
        command=command_for(facts),
        runbook=runbook(code),
    )


def _effect(facts: MoveFacts, weight: Weight) -> str:
    match facts.phase:
        case Phase.LOST:
            return f"{facts.vm} is gone: its memory is lost"
        case Phase.UNDECIDED:
            return f"nobody knows whether {facts.vm} runs on {facts.destination_host or facts.destination}"
        case Phase.FAILED:
            return f"{facts.vm} was not moved; it runs on {facts.source_host}"
        case _ if weight is Weight.SLOW:
            return f"{facts.vm} does not get on: {MEANING[facts.phase].words}"
        case _:
            waiting = facts.progress.waiting_faults
            vcpus = f"{waiting} vCPU{'s' if waiting != 1 else ''} wait" if waiting else "it waits at each missing page"
            return f"{facts.vm} is frozen or slow: {vcpus}"
