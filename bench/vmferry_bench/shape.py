"""Guests, sides and figures: the words that plan, rounds and results share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "vmferry"
PREEMPT = "qemu-preempt"
PLAIN = "qemu-plain"
SIDES = (OURS, PREEMPT, PLAIN)
"""The compared sides."""
ADOPTED = "vmferry, adopted QEMU"
"""vmferry moves an unmodified QEMU: the newest here."""
ITSELF = "the same QEMU by itself"
"""That QEMU with postcopy-preempt."""
TRACED = "qemu-preempt, traced"
"""A further round with QEMU's trace of its faults, for figures that it alone has. The trace costs time."""
BOUND = "bound"
"""A further round: a guest with all contents at hand, and a bare stream of as much."""
BACKINGS = ("memfd", "anonymous")


@dataclass(frozen=True, slots=True)
class Shape:
    """A guest. Its pages hold incompressible data that it verifies itself; the first 16 MiB are its tables."""

    workload: str = "random"
    memory_mib: int = 512
    vcpus: int = 1
    backing: str = "anonymous"
    write_percent: int = 20
    seed: int = 1
    push_mib_s: int = 0
    """The limit of the push, MiB/s; 0: none. Demand has none."""

    @property
    def name(self) -> str:
        limit = f", push {self.push_mib_s} MiB/s" if self.push_mib_s else ""
        return f"{self.workload}, {self.memory_mib} MiB, {self.vcpus} vCPU, {self.backing}{limit}"


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
    blackout_guest_s: float | None
    """From the guest's last turn on the source to its first on the destination, by the guest's counter."""
    blackout_vmm_s: float | None
    """vCPUs stopped to vCPUs told to run, as the VMMs tell it."""
    total_s: float | None
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
    """Fault read to page installed, by vmferry's pager and by QEMU's trace."""
    vmm_blocked_s: float | None = None
    """Time that vCPUs waited, as the VMM counts it (QEMU: postcopy-blocktime); vmferry leaves that to the guest."""
    table_bytes_per_page: float | None = None
    programs_cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU of all threads, vCPUs too, by program."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        shape = {name: getattr(self.shape, name) for name in Shape.__slots__}
        return {name: getattr(self, name) for name in Round.__slots__ if name != "shape"} | {"shape": shape}


Quantiles = dict[str, float]
"""`count`, `p50`, `p90`, `p99`, `max`; empty: not measured."""


APART = ", each end on a CPU of its own"
"""Behind a backing: the ends share no CPU, as on two hosts. Else the scheduler may keep both on one, where a wake
costs least."""


@dataclass(frozen=True, slots=True)
class Singles:
    """Faults one at a time, of memory of one kind, µs."""

    floor_us: Quantiles = field(default_factory=dict)
    """With userfaultfd and TCP alone, nothing else on the link."""
    idle_us: Quantiles = field(default_factory=dict)
    """Of vmferry, nothing else on the link."""
    poison_us: Quantiles = field(default_factory=dict)
    """The same of poisoned pages, in turn with ..."""
    data_us: Quantiles = field(default_factory=dict)
    """... pages with data."""


@dataclass(frozen=True, slots=True)
class Many:
    """VMs that touch pages at the same time."""

    vms: int
    pause_us: int
    """After each touch."""
    rates: list[float]
    """Faults a second of each VM while all of them touch, ascending."""
    p50_us: list[float]
    """Of each VM's touches, ascending."""
    p99_us: list[float]
    busy: float
    """Share of the machine's cores that were busy."""


@dataclass(frozen=True, slots=True)
class Alone:
    """Measurements of vmferry alone; empty: not measured."""

    singles: dict[str, Singles] = field(default_factory=dict)
    """By backing, and by backing and `APART`."""
    many: list[Many] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=dict)
    """The cost of a VM of 1 TiB, as in `paper.py`."""
    injected_us: Quantiles = field(default_factory=dict)
    """How long a thread of an adopted QEMU is stopped for one system call."""


def round_of(plain: dict[str, Any]) -> Round:
    """The opposite of `plain`."""
    buckets = [(float(low), float(high), int(count)) for low, high, count in plain["buckets"]]
    return Round(**(plain | {"shape": Shape(**plain["shape"]), "buckets": buckets}))


def alone_of(plain: dict[str, Any]) -> Alone:
    """The opposite of `asdict`."""
    singles = {where: Singles(**each) for where, each in plain["singles"].items()}
    many = [Many(**each) for each in plain["many"]]
    return Alone(singles, many, plain["paper"], plain.get("injected_us", {}))
