"""A QEMU with the Linux guest: its options, its console, and the states that the guest prints there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.linux_guest.image import LinuxImage
from tests.support.linux_guest.wire import Wire
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process
from vmferry.vmm.qemu.monitor import Monitor

MEMORY_MIB = 192
BALLOON = ("-device", "virtio-balloon-pci,id=balloon")
BOOTS_S = patient(150.0)
GOES_ON_S = patient(60.0)
LOOK_S = 0.1
KERNEL_LINE = "console=ttyS0 quiet loglevel=3 panic=-1 no_timer_check"
_FIELD = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True, slots=True)
class State:
    """One line of the guest. Counts since its boot; times in seconds since 1970."""

    boot: str
    touched: int
    wrong: int
    disk: int
    disk_wrong: int
    disk_errors: int
    random: int
    clock: float
    rtc: int

    @classmethod
    def of(cls, line: str) -> State:
        found = dict(_FIELD.findall(line))
        counts = {name: int(found[name]) for name in cls.__slots__ if name not in ("boot", "clock")}
        return cls(boot=found["boot"], clock=float(found["clock"]), **counts)

    @property
    def well(self) -> bool:
        return self.wrong == self.disk_wrong == self.disk_errors == 0


class Console:
    """The guest's serial line: a log of all that it printed, and a socket for orders."""

    def __init__(self, directory: Path, name: str) -> None:
        self.log = directory / f"{name}.console"
        self._socket = directory / f"{name}.serial"

    @property
    def options(self) -> list[str]:
        line = f"socket,id=console,path={self._socket},server=on,wait=off,logfile={self.log}"
        return ["-chardev", line, "-serial", "chardev:console"]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def states(self) -> list[State]:
        """In order; without the line that is being printed."""
        return [State.of(line) for line in self.text().split("\n")[:-1] if line.startswith("ALIVE ")]

    async def until(self, process: Process, holds: Callable[[State], bool], within_s: float = GOES_ON_S) -> State:
        """The first new state for which it holds. Raises: AssertionError."""
        seen = len(self.states())
        try:
            async with asyncio.timeout(within_s):
                while True:
                    for state in self.states()[seen:]:
                        if holds(state):
                            return state
                    assert process.alive, process.last_words()
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise AssertionError(f"{process.name} printed no such state:\n{self.text()[-1500:]}") from None

    async def hears(self, order: str) -> None:
        """Sends a line, and waits until the guest repeats it."""
        before = self.text().count(f"HEARD {order}")
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            writer.write(f"{order}\n".encode())
            await writer.drain()
            async with asyncio.timeout(GOES_ON_S):
                while self.text().count(f"HEARD {order}") == before:  # noqa: ASYNC110 QEMU writes the log
                    await asyncio.sleep(LOOK_S)
        finally:
            writer.close()
            reader.feed_eof()


@dataclass(slots=True)
class LinuxVm:
    """`name` of this QEMU, on the wire and of its files."""

    name: str
    process: Process
    monitor: Monitor
    console: Console

    async def lives(self, more: int = 2) -> State:
        """Waits until the guest has printed more states; the last. Raises: AssertionError if one is not well."""
        state = None
        for _ in range(more):
            state = await self.console.until(self.process, lambda _: True)
            assert state.well, state
        assert state is not None
        return state


def options(image: LinuxImage, disk: Path, wire: Wire, console: Console, name: str) -> list[str]:
    """The guest and its devices, without machine, memory and balloon."""
    return [
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", KERNEL_LINE),
        *console.options,
        *("-drive", f"file={disk},if=none,id=disk,format=raw,werror=report,rerror=report"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *wire.options(name),
        *("-device", "virtio-rng-pci"),
    ]
