"""The admin socket of `vmferry-refvm`: one JSON object a line, one answer a line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.units import LSB_4K, PAGE_4K

ANSWER_S = patient(10.0)
"""A report reads guest memory, and its pages may have to come from the source first."""


class AdminError(VmferryError):
    """The reference VMM refused, or does not run."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.VMM_REFUSED, message)


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """A machine check in the guest. `severity` is "AR" or "AO"; `lsb` is log2 of the lost bytes, 12 for 4 KiB."""

    gpa: int
    severity: str
    vcpu: int
    lsb: int = LSB_4K

    @property
    def pages(self) -> range:
        """The GPAs of the lost 4 KiB pages."""
        return range(self.gpa, self.gpa + (1 << self.lsb), PAGE_4K)


@dataclass(frozen=True, slots=True)
class Mapped:
    """A region of guest memory in its VMM, in bytes."""

    gpa: int
    hva: int
    size: int
    page_size: int

    @property
    def gpas(self) -> range:
        return range(self.gpa, self.gpa + self.size)


@dataclass(frozen=True, slots=True)
class GuestReport:
    """The guest's report. Its counts are in guest memory, so they move with the guest."""

    state: str = ""
    touches: int = 0
    writes: int = 0
    wrong_bytes: int = 0
    wrong_pages: tuple[int, ...] = ()
    machine_checks: tuple[MachineCheck, ...] = ()
    passes: int = 0
    first_touch_us: tuple[tuple[str, float], ...] = ()
    fatal: str = ""

    @property
    def pages_touched_here(self) -> int:
        """The pages that the guest has touched at least once on this host."""
        return int(dict(self.first_touch_us).get("count", 0))


def report_of(answer: dict[str, Any]) -> GuestReport:
    """Reads the answer to `report`. A missing field is a KeyError, never a zero that looks like success."""
    return GuestReport(
        state=answer["state"],
        touches=answer["touches"],
        writes=answer["writes"],
        wrong_bytes=answer["wrong_bytes"],
        wrong_pages=tuple(answer["wrong_pages"]),
        machine_checks=tuple(
            MachineCheck(check["gpa"], check["severity"], check["vcpu"], check["lsb"])
            for check in answer["machine_checks"]
        ),
        passes=answer["passes"],
        first_touch_us=tuple(answer["first_touch_us"].items()),
        fatal=answer.get("fatal") or "",
    )


class GuestAdmin(Protocol):
    """The way to a guest that is judged. Raises: AdminError."""

    async def raw_report(self) -> dict[str, Any]:
        """The report with its histogram."""
        ...

    async def report(self) -> GuestReport: ...

    async def regions(self) -> list[Mapped]: ...

    async def inject(self, gpas: Sequence[tuple[int, bool]], real_frames: bool = False) -> list[str]: ...

    async def close(self) -> None: ...


class Admin:
    """One connection, opened on first use and again after it broke. Commands are sent in the order of the calls."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._lock = asyncio.Lock()
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sends all commands at once and returns their answers in order.

        Raises:
            AdminError: no connection, or no answer in time. A refused command is an answer with `ok` False.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(ANSWER_S):
                    return await self._exchange(commands)
            except (OSError, EOFError, TimeoutError, ValueError) as error:
                await self._drop()
                raise AdminError(f"admin socket {self._socket}: {error or type(error).__name__}") from error

    async def _exchange(self, commands: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self._stream is None:
            self._stream = await asyncio.open_unix_connection(str(self._socket), limit=1 << 24)
        reader, writer = self._stream
        writer.write(b"".join(json.dumps(command).encode() + b"\n" for command in commands))
        await writer.drain()
        answers = []
        for _ in commands:
            line = await reader.readline()
            if not line:
                raise EOFError("closed by the VMM")
            answers.append(json.loads(line))
        return answers

    async def raw_report(self) -> dict[str, Any]:
        (answer,) = await self.ask([{"cmd": "report"}])
        if not answer.get("ok"):
            raise AdminError(f"report: {answer.get('error')}")
        return answer

    async def report(self) -> GuestReport:
        return report_of(await self.raw_report())

    async def regions(self) -> list[Mapped]:
        """The guest's memory. A waiting VMM has none."""
        (answer,) = await self.ask([{"cmd": "status"}])
        if not answer.get("ok"):
            raise AdminError(f"status: {answer.get('error')}")
        return [
            Mapped(region["gpa"], region["hva"], region["size"], region["page_size"]) for region in answer["regions"]
        ]

    async def inject(self, gpas: Sequence[tuple[int, bool]], real_frames: bool = False) -> list[str]:
        """Makes memory errors at the pages, each (GPA, tell the daemon?). Returns "" or the reason of the refusal for
        each.

        `real_frames`: the host takes the frames out of service until it boots again. Otherwise a marker stands for
        each.
        """
        commands = [{"cmd": "inject", "gpa": gpa, "tell": tell, "real_frame": real_frames} for gpa, tell in gpas]
        answers = await self.ask(commands)
        return ["" if answer.get("ok") else str(answer.get("error")) for answer in answers]

    async def _drop(self) -> None:
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    async def close(self) -> None:
        async with self._lock:
            await self._drop()
