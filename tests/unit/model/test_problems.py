"""Problems: the worst first, each with a cause, a command, and a section of the runbook; and the one vocabulary."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.scripted.ops import INCOMING, JOB, NOW_US, PROGRESS, into, out
from vmferry.errors import Reason
from vmferry.model.facts import HostFacts, Live, MoveFacts, PagerFacts, Step
from vmferry.model.migration import Outcome, Phase, PhaseChange
from vmferry.model.problems import COMMANDS, UnfitHost, problems
from vmferry.model.vocabulary import MEANING, Weight

REFERENCE = Path(__file__).parents[3] / "docs/reference"
DEAD = PagerFacts("host-b", "source", 3480, alive=False, exit="was killed by SIGKILL")


def found(*moves: MoveFacts) -> list[tuple[Weight, str, str]]:
    return [(one.weight, one.reason_code, one.vm) for one in problems("host-a", moves, (), 0, NOW_US)]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_section_of_the_runbook(reason: Reason) -> None:
    sections = (REFERENCE / "runbook.md").read_text().split("\n## ")[1:]
    (section,) = [one for one in sections if one.startswith(f"{reason}\n")]
    for part in ("**Symptom**", "**Cause**", "**Remedy**", "```sh"):
        assert part in section


def test_the_reference_of_states_is_the_vocabulary() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| (\w+) \| ([^|]+) \| ([^|]+) \| (\w*) ?\|$",
        (REFERENCE / "states.md").read_text(),
        re.MULTILINE,
    )
    documented = {row[0]: tuple(cell.strip("` ") for cell in row[1:]) for row in rows}
    assert documented == {
        phase.value: (one.words, one.level.value, one.source_vm, one.destination_vm, one.problem or "")
        for phase, one in MEANING.items()
    }
    assert set(MEANING) == set(Phase)


def test_all_is_well() -> None:
    assert found(out(JOB), into(INCOMING), out(replace(JOB, phase=Phase.COMPLETED))) == []


def test_a_dead_pager_of_the_other_host_is_the_cause_of_a_pause() -> None:
    record = replace(INCOMING, paused_reason="reset", course=(PhaseChange(Phase.POSTCOPY_PAUSED, 7),))
    progress = replace(PROGRESS, waiting_faults=2, oldest_fault_since_us=9)
    facts = into(replace(record, progress=progress), Live(there=HostFacts("host-b", pager=DEAD)))
    (problem,) = problems("host-a", [facts], (), 0, NOW_US)
    assert (problem.weight, problem.reason_code, problem.host) == (Weight.HURT, "PAGER_FAILED", "host-b")
    assert problem.cause == "the source's pager (host-b, pid 3480) was killed by SIGKILL"
    assert problem.effect == "db is frozen or slow: 2 vCPUs wait"
    assert (problem.since_us, problem.command) == (7, "vmferry show m2")
    assert problem.runbook.endswith("runbook.md#pager_failed")


def test_the_worst_comes_first() -> None:
    paused = out(replace(JOB, phase=Phase.POSTCOPY_PAUSED, reason_code=Reason.LINK_DOWN, reason="reset"))
    lost = out(replace(JOB, vm="gone", phase=Phase.LOST, ended_us=NOW_US, reason_code=Reason.VMM_GONE))
    failed = out(replace(JOB, vm="stays", phase=Phase.FAILED, ended_us=NOW_US, reason_code=Reason.VMM_TIMEOUT))
    assert found(failed, paused, lost) == [
        (Weight.LOST, "VMM_GONE", "gone"),
        (Weight.HURT, "LINK_DOWN", "web-1"),
        (Weight.FAILED, "VMM_TIMEOUT", "stays"),
    ]


def test_a_failure_is_history_after_an_hour() -> None:
    old = NOW_US - 3_700_000_000
    assert found(out(replace(JOB, phase=Phase.FAILED, ended_us=old, reason_code=Reason.VMM_GONE))) == []


def test_a_step_is_a_problem_after_five_seconds_and_names_its_host() -> None:
    job = replace(JOB, phase=Phase.PREPARING)
    for age_us, count in ((4_000_000, 0), (6_000_000, 1)):
        step = Step("the VMM of web-1 to make its memory", "host-b", NOW_US - age_us, NOW_US + 9)
        shown = problems("host-a", [out(job, Live(there=HostFacts("host-b", step=step)))], (), 0, NOW_US)
        assert len(shown) == count
    assert (shown[0].host, shown[0].cause) == ("host-b", "waits for the VMM of web-1 to make its memory on host-b")


def test_a_fault_that_does_not_end_is_a_problem_although_the_link_is_up() -> None:
    progress = replace(PROGRESS, waiting_faults=1, oldest_fault_since_us=NOW_US - 20_000_000)
    assert found(into(replace(INCOMING, progress=progress))) == [(Weight.HURT, "LINK_DOWN", "db")]


def test_a_refusal_is_told_by_the_source_alone() -> None:
    course = (PhaseChange(Phase.FAILED, NOW_US),)
    assert found(into(replace(INCOMING, outcome=Outcome.REFUSED, course=course))) == []


def test_an_unfit_host() -> None:
    (problem,) = problems("host-a", [], (UnfitHost("store", "/x is read-only"),), 5, NOW_US)
    assert (problem.weight, problem.reason_code, problem.since_us) == (Weight.HOST, "STORE_FAILED", 5)
    assert problem.cause == "store: /x is read-only"


def test_commands_are_for_reasons() -> None:
    assert set(COMMANDS) <= {reason.value for reason in Reason}
