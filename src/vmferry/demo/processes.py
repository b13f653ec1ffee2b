"""The processes of a stage. Each has a log, is ended by pid, and never outlives the stage."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmferry.demo.patience import patient

GRACE_S = patient(5.0)
"""The wait between SIGTERM and SIGKILL."""
END_S = patient(2.0)


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Finishes the work even if the caller is cancelled during it. The cancellation then takes effect."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


class Process:
    """A process that the stage started. Its output is in `log`."""

    def __init__(self, name: str, inner: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._inner = inner

    @classmethod
    async def start(
        cls, name: str, argv: Sequence[str], log: Path, netns: str = "", environment: Mapping[str, str] | None = None
    ) -> Process:
        """Starts the process in a session of its own. Ctrl-C then reaches only this process, which ends the others in
        order.
        """
        enter = ["nsenter", f"--net=/run/netns/{netns}", "--"] if netns else []
        with log.open("ab") as output:
            inner = await asyncio.create_subprocess_exec(
                *enter,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        return cls(name, inner, log)

    @property
    def pid(self) -> int:
        return self._inner.pid

    @property
    def alive(self) -> bool:
        return self._inner.returncode is None

    @property
    def exit_code(self) -> int | None:
        return self._inner.returncode

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            self._inner.send_signal(number)

    async def ended(self, within_s: float) -> bool:
        """Waits for the end of the process."""
        try:
            async with asyncio.timeout(within_s):
                await self._inner.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Sends SIGTERM, and SIGKILL to a process that ignores it."""
        self.signal(signal.SIGTERM)
        if not await self.ended(grace_s):
            await self.kill()

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended(GRACE_S)

    def last_words(self, lines: int = 8) -> str:
        """The end of the process's log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def processes_of(root: Path) -> list[int]:
    """The processes whose command line names a path below `root`. They are pagers: each has its own session and
    outlives its daemon. `root` is a fresh temporary directory, so no other process matches.
    """
    needle = f"{root}/".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # It ended before its command line was read.
        if needle in line:
            found.append(int(entry.name))
    return found


async def end_processes_of(root: Path, grace_s: float = END_S) -> list[int]:
    """Ends all processes and returns those that survive SIGKILL for the time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_of(root):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        end = time.monotonic() + grace_s
        while (left := processes_of(root)) and time.monotonic() < end:  # noqa: ASYNC110  # they are not ours to wait on
            await asyncio.sleep(0.02)
        if not left:
            return []
    return left
