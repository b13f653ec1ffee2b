"""The kinds of facts that either side of a migration makes durable before it acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JournalKind(StrEnum):
    """Kinds of journal entries. The source's and the destination's never mix, so one journal can hold both."""

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
