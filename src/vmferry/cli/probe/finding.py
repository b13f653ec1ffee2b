"""The finding of a check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """WARN: a feature works less well or is missing. MISSING: no migration is possible on this host."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `seen` is the actual value; `todo` is the remedy, empty if all is well."""

    name: str
    state: State
    seen: str
    todo: str = ""

    def plain(self) -> dict[str, str]:
        return {"check": self.name, "state": self.state.value, "seen": self.seen, "todo": self.todo}


def ok(name: str, seen: str) -> Finding:
    return Finding(name, State.OK, seen)


def warn(name: str, seen: str, todo: str) -> Finding:
    return Finding(name, State.WARN, seen, todo)


def missing(name: str, seen: str, todo: str) -> Finding:
    return Finding(name, State.MISSING, seen, todo)
