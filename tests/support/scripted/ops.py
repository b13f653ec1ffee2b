"""A state that a test scripts: what the daemon would say, without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmferry.model.facts import Direction, Live, MoveFacts, arriving, outgoing
from vmferry.model.memory_error import LedgerEntry, Origin, Severity
from vmferry.model.migration import Incoming, Job, Latency, Outcome, PageProgress, Phase
from vmferry.model.problems import Problem, problems
from vmferry.ops.state import Check, EventView, MachineView, State
from vmferry.units import Gpa

PROGRESS = PageProgress(
    total=1000,
    absent=400,
    demand=100,
    push=450,
    zero=40,
    poison=10,
    bytes_received=550 * 4096,
    faults=120,
    duplicate_faults=20,
    machine_checks=3,
    first_touch=Latency(count=100, p50_us=91.0, p90_us=200.0, p99_us=4200.0, max_us=9000.0),
)
ERROR = LedgerEntry(
    gpa=Gpa(0x1F000),
    origin=Origin.READ,
    severity=Severity.ACTION_REQUIRED,
    guest_visible=True,
    hop=2,
    count=3,
    first_seen_us=1_700_000_000_000_000,
    last_seen_us=1_700_000_001_000_000,
)
JOB = Job(
    migration="m1",
    vm="web-1",
    destination="h:1",
    phase=Phase.POSTCOPY,
    created_us=1,
    downtime_s=0.012,
    progress=PROGRESS,
    push_bytes_per_s=200 << 20,
)
INCOMING = Incoming("m2", "db", "host-b", Outcome.RUNNING, "", PROGRESS)
NOW_US = 1_700_000_002_000_000


def out(job: Job, live: Live = Live()) -> MoveFacts:  # noqa: B008 - frozen
    """The facts of a job on host-a."""
    return outgoing("host-a", job, live, NOW_US)


def into(record: Incoming, live: Live = Live()) -> MoveFacts:  # noqa: B008 - frozen
    """The facts of an incoming migration on host-a."""
    return arriving("host-a", record, live, NOW_US)


def with_problems(state: State) -> State:
    """The state with the problems of its migrations."""
    found = problems("host-a", (*state.moving, *state.ended), (), 0, NOW_US)
    return replace(state, problems=tuple(found))


STATE = State(
    host="host-a",
    at_us=NOW_US,
    machines=(MachineView("web-1", "MIGRATING_OUT", 2, "x86_64/kvm", 512 << 20, 4711, "m1"),),
    moving=(out(JOB), into(INCOMING)),
    ledgers={"web-1": (ERROR,)},
    events=(EventView(1_700_000_000_000_000, "m1", "QUEUED", "", "host-a"),),
)


@dataclass
class ScriptedSource:
    """`state` may be changed by the test at any time; an exception is raised instead."""

    value: State | Exception = STATE
    reads: int = 0

    async def state(self) -> State:
        self.reads += 1
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    async def problems(self) -> Sequence[Problem]:
        return (await self.state()).problems

    def note_checks(self, checks: Sequence[Check]) -> None:
        pass

    def phase(self, phase: Phase) -> None:
        assert isinstance(self.value, State)
        moving = (replace(one, phase=phase) if one.direction is Direction.OUT else one for one in self.value.moving)
        self.value = replace(self.value, moving=tuple(moving))


@dataclass
class ScriptedReadiness:
    value: Sequence[Check] = (Check("store", True, "writable"),)

    async def checks(self) -> Sequence[Check]:
        return self.value
