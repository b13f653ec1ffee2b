"""Samples what the processors do during a move, by `perf`, and draws it for each pager."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vmferry.demo.processes import processes_of
from vmferry_bench.native import BenchError, native
from vmferry_bench.phases import times

PERF = "perf"
HERTZ = 4999
"""No divisor of the scheduler's tick, so that the two do not go in step."""
ROLES = ("source", "destination")
LOOK_EVERY_S = 0.01
STOP_S = 60.0


def usable() -> bool:
    return shutil.which(PERF) is not None


class Sampler:
    """`around` is entered for one move; `draw` makes of it a flame graph a pager. All files are in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._data = directory / "perf.data"
        self._pids: dict[str, int] = {}

    @asynccontextmanager
    async def around(self, root: Path) -> AsyncIterator[None]:
        """Records all processors, and notes which processes below `root` are pagers.

        Raises:
            BenchError: perf does not work here; with its words.
        """
        # By the timer of cpu-clock: a virtual machine need not have counters. Stacks by frame pointers.
        options = ("-a", "-e", "cpu-clock", "-F", str(HERTZ), "-g", "-o", str(self._data))
        log = self._directory / "perf.log"
        with log.open("wb") as words:
            process = await asyncio.create_subprocess_exec(PERF, "record", *options, stdout=words, stderr=words)
        looking = asyncio.create_task(self._look(root), name="look for pagers")
        try:
            await asyncio.sleep(0.2)  # for perf to have begun
            if process.returncode is not None:
                raise BenchError(f"perf record: {log.read_text(errors='replace').strip()}")
            yield
        finally:
            looking.cancel()
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
            async with asyncio.timeout(STOP_S):
                await process.wait()

    async def _look(self, root: Path) -> None:
        while True:
            for pid in processes_of(root):
                if (role := role_of(_command_line(pid))) is not None:
                    self._pids[role] = pid
            await asyncio.sleep(LOOK_EVERY_S)

    async def draw(self, title: str) -> dict[str, dict[str, int]]:
        """ns on a processor by phase of each pager; writes ROLE.svg and ROLE.folded."""
        found = {}
        for role in ROLES:
            if role not in self._pids:
                raise BenchError(f"the {role}'s pager was not seen")
            script = self._directory / f"{role}.script"
            await self._script(self._pids[role], script)
            folded = self._directory / f"{role}.folded"
            files = ("--svg", str(self._directory / f"{role}.svg"), "--folded", str(folded))
            await native("flame", str(script), *files, "--title", f"{role}'s pager: {title}")
            script.unlink()
            found[role] = times(folded.read_text().splitlines())
        self._data.unlink()
        return found

    async def _script(self, pid: int, to: Path) -> None:
        with to.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(PERF, "script", "-i", str(self._data), "--pid", str(pid), "--no-inline"),
                stdout=output,
                stderr=asyncio.subprocess.PIPE,
            )
            _, words = await process.communicate()
        if process.returncode:
            raise BenchError(f"perf script: {words.decode(errors='replace').strip()}")


def _command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def role_of(argv: list[str]) -> str | None:
    """Which pager a command line is of, if any."""
    if not argv or Path(argv[0]).name != "vmferry-pager" or "--role" not in argv[:-1]:
        return None
    role = argv[argv.index("--role") + 1]
    return role if role in ROLES else None
