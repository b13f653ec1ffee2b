"""The journal of a migration: facts that each side makes durable before it acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JournalKind(StrEnum):
    """The kinds of journal entries. Source and destination have different kinds, so one journal can hold both."""

    BEGIN = "begin"
    COMMIT = "commit"
    ABORTED = "aborted"
    SETTLED = "settled"
    PREPARED = "prepared"
    RUNNING = "running"
    COMPLETED = "completed"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A durable fact of a migration: `kind` is a `journal.JournalKind`, `data` is JSON-ready."""

    migration: str
    kind: str
    at_us: int
    data: dict[str, object]
