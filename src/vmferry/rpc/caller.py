"""The caller of the present call, as the gate of its port knows it: "user:kim", or the name in its certificate."""

from __future__ import annotations

from contextvars import ContextVar

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Empty, or "anonymous" on a port without certificates: then the address alone is known."""
