"""The roles of callers, and the role that each call needs. Pure. A caller without a role may call nothing.

```
 admin ⊇ operator ⊇ viewer        reporter: memory errors alone
```
A call that this file does not know needs `admin`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmferry.security.caller import Caller


class Role(StrEnum):
    """A key of `[access]`."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    REPORTER = "reporter"
    ADMIN = "admin"


PATTERN = r"spiffe://[^\s]{1,2000}|user:[^\s:]{1,64}"
"""A subject of `[access]`: a SPIFFE ID, in which `*` stands for one part of the path or less, or a unix user."""

_INCLUDES: Mapping[Role, frozenset[Role]] = {
    Role.VIEWER: frozenset({Role.VIEWER}),
    Role.OPERATOR: frozenset({Role.VIEWER, Role.OPERATOR}),
    Role.REPORTER: frozenset({Role.REPORTER}),
    Role.ADMIN: frozenset(Role),
}
_READS = ("Get", "List", "Watch", "Check")
_OPERATES = ("Create", "Cancel", "Set", "Adopt")
_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")
"""Services that every caller with any role may call."""


def role_needed(method: str) -> Role | None:
    """The role for a call by its gRPC path, e.g. "/vmferry.v1.Migrations/GetMigration". None: any role."""
    if method.startswith(_OPEN):
        return None
    call = method.rsplit("/", 1)[-1]
    if call.startswith(_READS):
        return Role.VIEWER
    if call.startswith(_OPERATES):
        return Role.OPERATOR
    return Role.REPORTER if call == "ReportMemoryError" else Role.ADMIN


def changes(method: str) -> bool:
    """Whether the call may change something: then the audit log has it."""
    return role_needed(method) not in (None, Role.VIEWER)


@dataclass(frozen=True, slots=True)
class Access:
    """The subjects of each role."""

    subjects: Mapping[Role, Sequence[str]]

    def roles(self, caller: Caller) -> frozenset[Role]:
        """All roles of a caller, with those that they include."""
        own = {role for role, patterns in self.subjects.items() if any(_is(caller, one) for one in patterns)}
        return frozenset().union(*(_INCLUDES[role] for role in own))

    def problem(self, caller: Caller | None, method: str) -> str | None:
        """The reason to refuse the call. None: the caller may make it."""
        if caller is None:
            return "the connection has no caller"
        roles, needed = self.roles(caller), role_needed(method)
        if needed in roles or (needed is None and roles):
            return None
        has = ", ".join(sorted(roles)) or "no role"
        return f"{caller} has {has}; this call needs {needed or 'any role'}"


def _is(caller: Caller, pattern: str) -> bool:
    if pattern.startswith("user:"):
        return caller.user is not None and pattern == f"user:{caller.user}"
    if caller.names is None or len(caller.names.uris) != 1:
        return False
    parts, wanted = caller.names.uris[0].split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
