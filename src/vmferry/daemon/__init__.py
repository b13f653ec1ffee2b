"""The daemon: configuration, wiring, signals. `main` is the program `vmferryd`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vmferryd` and returns its exit code."""
    from vmferry.daemon.assembly import assemble
    from vmferry.daemon.program import run

    return run(argv, assemble)
