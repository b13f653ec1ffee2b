"""Drives `emulator.c`: a network between two namespaces, with conditions that change while it runs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

MTU = 1500
ADDRESSES = ("10.214.88.1", "10.214.88.2")
"""Seen only inside the two namespaces."""
SEED = 1


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of one direction. `queue_ms` is the longest queue at `rate_mbit`. A packet of more than `largest`
    bytes is dropped, if that is not 0. `reorder_percent` of the packets overtake the others by the delay."""

    delay_ms: float = 0
    jitter_ms: float = 0
    loss_percent: float = 0
    reorder_percent: float = 0
    rate_mbit: float = 0
    queue_ms: float = 0
    largest: int = 0
    hole: bool = False

    def command(self) -> str:
        values = {
            "delay_us": self.delay_ms * 1e3,
            "jitter_us": self.jitter_ms * 1e3,
            "loss_ppm": self.loss_percent * 1e4,
            "reorder_ppm": self.reorder_percent * 1e4,
            "rate_bit_s": self.rate_mbit * 1e6,
            "queue_bytes": self.rate_mbit * 1e6 / 8 * self.queue_ms / 1e3,
            "largest": self.largest,
            "hole": self.hole,
        }
        return " ".join(f"{key}={int(value)}" for key, value in values.items())


CLEAN = Conditions()


class Emulator:
    """A running emulator. Commands are answered before they return, so a condition holds for the next packet."""

    def __init__(self, program: Path, namespaces: tuple[str, str], seed: int = SEED, mtu: int = MTU) -> None:
        ends = [f"{ip}/30" for ip in ADDRESSES]
        argv = [program, str(seed), str(mtu), namespaces[0], ends[0], namespaces[1], ends[1]]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._answered("ready")

    def set(self, conditions: Conditions, direction: str = "both") -> None:
        """`direction`: "ab", "ba" or "both"."""
        self._say(f"{direction} {conditions.command()}")
        self._answered("ok")

    def stats(self) -> dict[str, int]:
        """`ab_carried`, `ab_bytes`, `ab_lost`, `ab_overflowed`, and the same of `ba`."""
        self._say("stats")
        return {key: int(value) for key, value in (word.split("=") for word in self._line().split())}

    def stop(self) -> None:
        with self._process:
            self._process.kill()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _answered(self, wanted: str) -> None:
        said = self._line()
        assert said == wanted, f"the emulator says {said!r}, not {wanted!r}; exit code {self._process.poll()}"


def compile_emulator(directory: Path) -> Path:
    program = directory / "emulator"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, Path(__file__).with_name("emulator.c")], check=True)
    return program
