"""The VMM of `vmm_child.c` as a test drives it, and the messages that a VMM sends on its memory socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tests.support.c_programs import VMM_CHILD, compiled
from vmferry.demo.patience import patient

PAGE = 4096
PATIENCE_S = patient(30.0)

# The bits this project may ask for, linux/userfaultfd.h
FEATURES = {
    "UFFD_FEATURE_EVENT_FORK": 1 << 1,
    "UFFD_FEATURE_EVENT_REMAP": 1 << 2,
    "UFFD_FEATURE_EVENT_REMOVE": 1 << 3,
    "UFFD_FEATURE_MISSING_HUGETLBFS": 1 << 4,
    "UFFD_FEATURE_MISSING_SHMEM": 1 << 5,
    "UFFD_FEATURE_EVENT_UNMAP": 1 << 6,
    "UFFD_FEATURE_THREAD_ID": 1 << 8,
    "UFFD_FEATURE_MINOR_HUGETLBFS": 1 << 9,
    "UFFD_FEATURE_MINOR_SHMEM": 1 << 10,
    "UFFD_FEATURE_EXACT_ADDRESS": 1 << 11,
    "UFFD_FEATURE_POISON": 1 << 14,
}

KINDS = {"anonymous": "anon", "memfd": "shmem", "anonymous hugetlb": "hugetlb", "hugetlb": "hugefile"}
"""Backings by their names in `facts.h`."""

Json: TypeAlias = dict[str, Any]


def compile_child(directory: Path) -> Path:
    """`vmm_child.c`, compiled; it includes a header from the directory of the kernel tests."""
    return compiled(VMM_CHILD, directory)


def feature_bits(names: Sequence[str]) -> int:
    """The bits of features by their kernel names."""
    return sum(FEATURES[name] for name in set(names))


@dataclass
class Vmm:
    """The child process. `said` is all that it has said, in order."""

    process: asyncio.subprocess.Process
    backing: str
    memory_socket: Path
    hva: int = 0
    said: list[str] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _acts: int = 0
    _listener: asyncio.Task[None] | None = None

    @staticmethod
    async def start(
        program: Path, backing: str, pages: int, features: int, memory_socket: Path, *, first_uffd: int | None = None
    ) -> Vmm:
        """`first_uffd`: how many pages are registered with the first userfaultfd; the rest with a second."""
        kind = KINDS[backing]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            program,
            kind,
            str(pages),
            f"{features:x}",
            str(pages if first_uffd is None else first_uffd),
            stdin=pipe,
            stdout=pipe,
        )
        vmm = Vmm(process, backing, memory_socket)
        vmm._listener = asyncio.create_task(vmm._listen(), name="vmm child")
        vmm.hva = int((await vmm.line("ready ")).split()[1])
        return vmm

    async def _listen(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            await self._hear(line.decode().rstrip("\n"))
        await self._hear("ended")

    async def _hear(self, line: str) -> None:
        async with self._news:
            self.said.append(line)
            self._news.notify_all()

    async def line(self, start: str, after: int = 0) -> str:
        """The first line from `after` on that begins so; waits for it."""
        return (await self.until(lambda: [line for line in self.said[after:] if line.startswith(start)]))[0]

    async def until(self, found: Callable[[], list[str]]) -> list[str]:
        """The first result of `found` that is not empty. A VMM that ended says no more."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: found() or "ended" in self.said)
        assert found(), f"the VMM ended: {self.said}"
        return found()

    async def command(self, line: str, body: bytes = b"") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode() + body)
        await self.process.stdin.drain()

    async def send(self, message: Json | list[Json] | bytes, descriptors: str) -> None:
        """Sends one memory message on a new connection; a letter a descriptor, see `vmm_child.c`."""
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        await self.command(f"send {self.memory_socket} {descriptors or '-'} {len(body)}", body)

    async def answer(self, message: Json | list[Json] | bytes, descriptors: str) -> Json:
        """Sends, and waits for the first frame that answers it."""
        before = len(self.said)
        await self.send(message, descriptors)
        return dict(json.loads((await self.line("frame ", before)).removeprefix("frame ")))

    @property
    def frames(self) -> list[Json]:
        """Frames so far, without `attached`."""
        frames = [json.loads(line.removeprefix("frame ")) for line in self.said if line.startswith("frame ")]
        return [frame for frame in frames if frame["type"] != "attached"]

    async def start_touch(self, page: int) -> tuple[int, int]:
        """A thread touches the page. Returns the act's id and the thread's."""
        self._acts += 1
        act = self._acts
        await self.command(f"touch {act} {page}")
        return act, int((await self.line(f"touching {act} ")).split()[2])

    async def touched(self, act: int) -> str:
        """The result of a touch: `byte:N`, `mixed` (bytes differ), `sigbus`; waits for its end."""
        return (await self.line(f"touched {act} ")).split()[2]

    def waits(self, act: int) -> bool:
        return not any(line.startswith(f"touched {act} ") for line in self.said)

    async def touch(self, page: int) -> str:
        return await self.touched((await self.start_touch(page))[0])

    async def advise(self, page: int, advice: str) -> None:
        """madvise on one page; returns once the kernel did it, which may wait for the pager."""
        self._acts += 1
        act = self._acts
        await self.command(f"advise {act} {page} {advice}")
        assert (await self.line(f"advised {act} ")).split()[2] == "0"

    async def give_back(self, page: int) -> None:
        """As a balloon does: the page's content is gone. MADV_DONTNEED leaves that of a shared file where it is."""
        await self.advise(page, "remove" if self.backing in {"memfd", "hugetlb"} else "dontneed")

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        async with asyncio.timeout(PATIENCE_S):
            await self.process.wait()
            if self._listener is not None:
                await self._listener
