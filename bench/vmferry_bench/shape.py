"""What is moved, by whom: the words that plan, rounds and results share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "vmferry"
PREEMPT = "qemu-preempt"
PLAIN = "qemu-plain"
SIDES = (OURS, PREEMPT, PLAIN)


@dataclass(frozen=True, slots=True)
class Shape:
    """A guest. Its pages hold incompressible data that it verifies itself; the first 16 MiB are its tables."""

    workload: str = "random"
    memory_mib: int = 512
    vcpus: int = 1
    backing: str = "anonymous"
    write_percent: int = 20
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.memory_mib} MiB, {self.vcpus} vCPU, {self.backing}"


Bucket = tuple[float, float, int]
"""Of a latency histogram: from, to (half-open, µs), and how many."""


def is_warm(shape: Shape, report: Mapping[str, Any]) -> bool:
    """Whether the guest has been through its memory; one that pauses at each page need not, it would take long."""
    return bool(report["touches"] >= 1000 if shape.workload == "paced" else report["passes"] >= 1)


@dataclass(slots=True)
class Round:
    """One move, as measured. Times in seconds; None: not measured on this side."""

    side: str
    shape: Shape
    number: int
    buckets: list[Bucket]
    """First touches on the destination until shortly after the last page came, all of them, by the guest's counter."""
    longest_us: float
    blackout_guest_s: float
    """From the guest's last turn on the source to its first on the destination, by the guest's counter."""
    blackout_vmm_s: float
    """vCPUs stopped to vCPUs told to run, as the VMMs tell it."""
    total_s: float
    """Command to last page."""
    postcopy_s: float
    """vCPUs told to run to last page."""
    postcopy_bytes: int
    """Page contents that came in that time."""
    machinery_cpu_s: float
    """CPU of both ends, of all threads but those of vCPUs."""
    vcpu_cpu_s: float
    wrong_bytes: int
    faults: str = ""
    """Why the round is void: "" if it is not."""
    handler_us: dict[str, float] | None = None
    """Requested to installed, as the one who answers faults tells it; QEMU does not."""
    vmm_blocked_s: float | None = None
    """Time that vCPUs waited, as the VMM counts it (QEMU: postcopy-blocktime); vmferry leaves that to the guest."""
    table_bytes_per_page: float | None = None
    programs_cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU of all threads, vCPUs too, by program."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        shape = {name: getattr(self.shape, name) for name in Shape.__slots__}
        return {name: getattr(self, name) for name in Round.__slots__ if name != "shape"} | {"shape": shape}


@dataclass(frozen=True, slots=True)
class Alone:
    """What is measured beside the rounds; an empty dictionary: not measured. Times in µs, by `p50`, `p99` and so on."""

    floor_us: dict[str, float] = field(default_factory=dict)
    """A fault with userfaultfd and TCP alone, nothing else on the link."""
    idle_us: dict[str, float] = field(default_factory=dict)
    """A fault of vmferry, nothing else on the link."""
    poison_us: dict[str, float] = field(default_factory=dict)
    """The same of poisoned pages, in turn with ..."""
    data_us: dict[str, float] = field(default_factory=dict)
    """... pages with data."""
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Faults a second of each VM, ascending, by the number of VMs at the same time."""


def round_of(plain: dict[str, Any]) -> Round:
    """The opposite of `plain`."""
    buckets = [(float(low), float(high), int(count)) for low, high, count in plain["buckets"]]
    return Round(**(plain | {"shape": Shape(**plain["shape"]), "buckets": buckets}))
