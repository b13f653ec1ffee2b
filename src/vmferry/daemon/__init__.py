"""The daemon: configuration, wiring, signals. `main` is the program `vmferryd`."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vmferryd` and returns its exit code."""
    # While the modules load, Ctrl-C ends the process. Python would show where it was.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The C core writes lines of its own, which are no JSON. Each of its errors is raised too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from vmferry.daemon import last_words

    try:
        from vmferry.daemon.assembly import assemble
        from vmferry.daemon.program import run
    except Exception as error:  # noqa: BLE001 a library may fail in any way
        words = f"vmferryd cannot be loaded: {error!r}. Install the wheel of vmferry with all that it requires."
        last_words.say(last_words.log_format(last_words.config_path(argv)), words)
        return 1
    code = run(argv, assemble)
    # It has stopped: another Ctrl-C changes nothing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code
