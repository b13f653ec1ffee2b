"""Checks requests and names every wrong field. Pure: messages in, violations out."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmferry.errors import Reason, VmferryError
from vmferry.model.names import MIGRATION_ID, VM_NAME, parse_address
from vmferry.units import LSB_4K, PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST

GPA_END = 1 << 52
"""Physical addresses of x86-64 have at most 52 bits (Intel SDM vol. 3A, 4.1.4)."""
LSB_1G = 30
REVISION_END = 1 << 63
"""Revisions are the store's numbers, signed integers of 64 bits."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field and its rule."""

    field: str
    description: str


class InvalidRequest(VmferryError):  # noqa: N818 - names the state, as gRPC does
    """A request with wrong fields. It becomes INVALID_ARGUMENT with a BadRequest detail."""

    def __init__(self, violations: tuple[Violation, ...]) -> None:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        super().__init__(Reason.INVALID_ARGUMENT, text, "Correct the fields named.")
        self.violations = violations


class Checks:
    """Collects the violations of one request. `done` raises if there are any."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def violation(self, field: str, description: str) -> None:
        self._violations.append(Violation(field, description))

    def migration_id(self, value: str, field: str = "migration_id", optional: bool = False) -> None:
        if not (optional and not value):
            self._pattern(field, value, MIGRATION_ID)

    def vm(self, value: str, field: str = "vm", optional: bool = False) -> None:
        if not (optional and not value):
            self._pattern(field, value, VM_NAME)

    def destination(self, value: str, field: str = "destination") -> None:
        if parse_address(value, least_port=1) is None:
            self.violation(field, f'must be "host:port" of the destination\'s peer endpoint, is {_shown(value)}')

    def page_size(self, value: int, most: int, default: int) -> None:
        if not 0 <= value <= most:
            self.violation("page_size", f"must be from 1 to {most}, or 0 for {default}; is {value}")

    def revision(self, value: int, field: str = "after_revision") -> None:
        if value >= REVISION_END:
            self.violation(field, f"must be below 2^63, is {value}")

    def push_limit(self, value: int, field: str = "push_bytes_per_s") -> None:
        if value and not PUSH_LIMIT_LEAST <= value <= PUSH_LIMIT_MOST:
            self.violation(field, f"must be 0 or from {PUSH_LIMIT_LEAST} to {PUSH_LIMIT_MOST}, is {value}")

    def memory_error(self, gpa: int, lsb: int) -> int:
        """Checks the block and returns its `lsb`, by default 12."""
        block = lsb or LSB_4K
        if not LSB_4K <= block <= LSB_1G:
            self.violation("lsb", f"must be from {LSB_4K} to {LSB_1G}, or 0 for {LSB_4K}; is {lsb}")
        elif gpa % (1 << block):
            self.violation("gpa", f"must be aligned to 2^{block} bytes, is {gpa:#x}")
        if gpa >= GPA_END:
            self.violation("gpa", f"must be below {GPA_END:#x}, is {gpa:#x}")
        return block

    def done(self) -> None:
        """Raises: InvalidRequest."""
        if self._violations:
            raise InvalidRequest(tuple(self._violations))

    def _pattern(self, field: str, value: str, pattern: str) -> None:
        if not value:
            self.violation(field, f"is missing; must match {pattern}")
        elif not re.fullmatch(pattern, value):
            self.violation(field, f"must match {pattern}, is {_shown(value)}")


def _shown(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
