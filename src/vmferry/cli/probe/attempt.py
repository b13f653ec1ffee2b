"""Tries an operation in a child process, because the operation may hang or kill its process."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

DEADLINE_S = 5.0
"""A probe takes milliseconds. One that takes this long hangs in the kernel, or waits for a fault without a handler."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The end of a probe. `seen` is the finding, or the reason of the failure."""

    worked: bool
    seen: str


def attempt(probe: Callable[[], str], deadline_s: float = DEADLINE_S) -> Attempt:
    """Runs `probe` in a child. The probe returns its finding or raises OSError.

    A fork, not a new interpreter: a probe is a handful of system calls, and the caller has no threads yet.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_and_exit(probe, writing)
    os.close(writing)
    try:
        answer = _read_until_end(reading, deadline_s)
    finally:
        os.close(reading)
    if answer is None:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if answer is None:
        return Attempt(False, f"no answer within {deadline_s:g} s")
    if os.WIFSIGNALED(status):
        return Attempt(False, f"died of {signal.Signals(os.WTERMSIG(status)).name}")
    return Attempt(os.waitstatus_to_exitcode(status) == 0, answer or "no reason given")


def _run_and_exit(probe: Callable[[], str], writing: int) -> None:
    status = 1
    faulthandler.disable()  # The child's death is a result, not a defect.
    try:
        words = probe()
        status = 0
    except OSError as error:
        words = f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:  # noqa: BLE001  # a child must never return into the caller's code
        words = f"{type(error).__name__}: {error}"
    os.write(writing, words.encode())
    os._exit(status)


def _read_until_end(reading: int, deadline_s: float) -> str | None:
    """Everything that the child wrote. None: it did not close its end in time."""
    end = time.monotonic() + deadline_s
    answer = b""
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        piece = os.read(reading, 4096)
        if not piece:
            return answer.decode(errors="replace")
        answer += piece
