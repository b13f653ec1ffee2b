"""QEMU's monitor (docs/interop/qmp-intro.txt of QEMU): commands, answers, events."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from vmferry_bench.native import BenchError


class Qmp:
    """One connection. Events are kept, each with the time that QEMU gave it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._news = asyncio.Condition()
        self.events: list[dict[str, Any]] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, socket: Path, within_s: float = 10.0) -> None:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    reader, self._writer = await asyncio.open_unix_connection(str(socket), limit=1 << 22)
                    break
                except OSError:
                    await asyncio.sleep(0.02)
        self._reading = asyncio.create_task(self._read(reader), name=f"qmp of {self._name}")
        await self.ask("qmp_capabilities")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "event" in message:
                async with self._news:
                    self.events.append(message)
                    self._news.notify_all()
            elif "QMP" not in message:
                self._answers.put_nowait(message)
        self._answers.put_nowait({"error": {"desc": "QEMU closed its monitor"}})

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Raises:
        BenchError: QEMU refused, or went away.
        """
        if self._writer is None:
            raise BenchError(f"{self._name}: no monitor")
        message = json.dumps({"execute": command, "arguments": arguments})
        self._writer.write(message.encode() + b"\n")
        async with asyncio.timeout(30):
            answer = await self._answers.get()
        if "error" in answer:
            raise BenchError(f"{self._name}, {command}: {answer['error']['desc']}")
        return answer["return"]

    def when(self, event: str, status: str = "") -> float | None:
        """When the event (with that `status` in its data) came first, seconds since 1970; None if it has not."""
        for message in self.events:
            if message["event"] == event and (not status or message["data"].get("status") == status):
                return float(message["timestamp"]["seconds"] + message["timestamp"]["microseconds"] / 1e6)
        return None

    async def until(self, event: str, status: str = "", within_s: float = 60.0) -> float:
        """Waits for an event and returns its time."""
        try:
            async with asyncio.timeout(within_s), self._news:
                await self._news.wait_for(lambda: self.when(event, status) is not None or self._failed())
        except TimeoutError:
            raise BenchError(f"{self._name}: no {event} {status} within {within_s:g} s") from None
        at = self.when(event, status)
        if at is None:
            raise BenchError(f"{self._name}: the migration failed before {event} {status}")
        return at

    def _failed(self) -> bool:
        return self.when("MIGRATION", "failed") is not None

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
