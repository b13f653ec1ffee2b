"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """WARN: something works less well, or a feature is not to be had. MISSING: no migration is possible here."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """`seen`: the actual value; `todo`: what to do, empty if all is well."""

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
