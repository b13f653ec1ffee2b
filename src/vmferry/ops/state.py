"""The values that the ops endpoint reads from the daemon, and the Protocols that give them. It imports no grpc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vmferry.model.facts import MoveFacts
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import PageProgress
from vmferry.model.problems import Problem
from vmferry.model.totals import Totals


@dataclass(frozen=True, slots=True)
class MachineView:
    """A VM that this daemon knows. `state` is a name of `MachineState` in machines.proto without its prefix."""

    vm: str
    state: str
    vcpus: int
    platform: str
    memory_bytes: int
    vmm_pid: int
    migration: str = ""
    progress: PageProgress | None = None


@dataclass(frozen=True, slots=True)
class EventView:
    """A fact of a migration's course, on either host. `at_us` is Unix microseconds."""

    at_us: int
    migration: str
    kind: str
    detail: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class SecurityView:
    """The figures of the daemon's security. `refusals` are by port and cause, since the daemon's start."""

    certificate_days_left: float | None = None
    """None: connections are plain."""
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """All figures at one moment (`at_us`, Unix microseconds). `ledgers` are by VM, of the VMs that are here."""

    host: str
    at_us: int
    machines: tuple[MachineView, ...] = ()
    moving: tuple[MoveFacts, ...] = ()
    """The migrations under way, in both directions."""
    ended: tuple[MoveFacts, ...] = ()
    """Those that ended last, the newest first."""
    ended_count: int = 0
    """All ended migrations that are kept."""
    ledgers: Mapping[str, tuple[LedgerEntry, ...]] = field(default_factory=dict)
    events: tuple[EventView, ...] = ()
    security: SecurityView = field(default_factory=SecurityView)
    problems: tuple[Problem, ...] = ()
    totals: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class Check:
    """One condition of readiness. `detail` is the finding and, if `ok` is False, the remedy."""

    name: str
    ok: bool
    detail: str


class StateSource(Protocol):
    """The source of the state. The daemon implements it; tests have a scripted one."""

    async def state(self) -> State: ...
    async def problems(self) -> Sequence[Problem]:
        """The problems alone, the worst first."""
        ...

    def note_checks(self, checks: Sequence[Check]) -> None:
        """Takes the newest readiness: a failed check is a problem of the host."""


class Readiness(Protocol):
    """Tries every condition that the daemon needs for its work."""

    async def checks(self) -> Sequence[Check]: ...
