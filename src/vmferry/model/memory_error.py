"""A VM's memory errors: the entries of its ledger."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmferry.units import LSB_4K, Gpa


class Origin(StrEnum):
    """The origin of a memory error (`ErrorOrigin` in common.proto)."""

    VMM = "vmm"
    OPERATOR = "operator"
    READ = "read"
    LOST = "lost"
    DESTINATION = "destination"


class Severity(StrEnum):
    """Machine-check severity (Intel SDM vol. 3B, 17.6)."""

    ACTION_OPTIONAL = "AO"
    ACTION_REQUIRED = "AR"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One memory error in the ledger of a VM, keyed by `gpa`. Times are Unix microseconds.

    `replacements` counts how often the VMM put fresh memory in the place of the page, when its guest was reset;
    `replaced` holds from then until the page is found bad again.
    """

    gpa: Gpa
    origin: Origin
    lsb: int = LSB_4K
    severity: Severity | None = None
    guest_visible: bool = False
    hop: int = 0
    count: int = 1
    first_seen_us: int = 0
    last_seen_us: int = 0
    replacements: int = 0
    replaced: bool = False
