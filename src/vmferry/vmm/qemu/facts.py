"""The facts of one QEMU: its own answers, and the kernel's about its memory. Values only; `survey.py` collects them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import msgspec

from vmferry.model.memory import Backing, MemoryKind, MemoryLayout, MemoryRegion
from vmferry.units import Hva
from vmferry.vmm.qemu.memory_map import GuestRegion, RamBlock

Answer = TypeVar("Answer")

TELLS_ADDRESSES = (8, 2)
"""From this version on `info ramblock` gives host addresses."""


class VersionTriple(msgspec.Struct, frozen=True):
    major: int
    minor: int
    micro: int


class VersionInfo(msgspec.Struct, frozen=True):
    """`query-version`."""

    qemu: VersionTriple


class StatusInfo(msgspec.Struct, frozen=True):
    """`query-status`."""

    status: str
    running: bool


class CpuInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """One of `query-cpus-fast`."""

    thread_id: int
    qom_path: str


class MemdevInfo(msgspec.Struct, frozen=True):
    """One of `query-memdev`."""

    id: str = ""


class NameInfo(msgspec.Struct, frozen=True):
    """`query-name`."""

    name: str = ""


class KvmInfo(msgspec.Struct, frozen=True):
    """`query-kvm`."""

    enabled: bool


class MigrationInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """`query-migrate`."""

    status: str = ""
    blocked_reasons: list[str] = []
    error_desc: str = ""


class FdsetFd(msgspec.Struct, frozen=True):
    """A descriptor of `query-fdsets`."""

    fd: int
    opaque: str = ""


class FdsetInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """One of `query-fdsets`."""

    fdset_id: int
    fds: list[FdsetFd]


class MigrationParameters(msgspec.Struct, frozen=True, rename="kebab"):
    """`query-migrate-parameters`."""

    max_bandwidth: int


class QomProperty(msgspec.Struct, frozen=True):
    """One of `qom-list`."""

    name: str
    type: str


class Kind(StrEnum):
    """The kind of a mapping."""

    ANONYMOUS = "anonymous memory"
    MEMFD = "a memfd"
    TMPFS = "a file of a tmpfs"
    HUGETLBFS = "huge pages"
    FILE = "a file on a disk"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """A region of guest memory in the process. `file`: index of its descriptor among those that came with it."""

    region: GuestRegion
    hva: Hva
    kind: Kind
    shared: bool
    page_size: int
    path: str = ""
    offset: int = 0
    file: int | None = None

    @property
    def backing(self) -> Backing:
        """As vmferry moves it: through its file where that is shared, else through the process."""
        return Backing.MEMFD if self.shared and self.kind is not Kind.ANONYMOUS else Backing.ANONYMOUS


@dataclass(frozen=True, slots=True)
class Machine:
    """The virtual machine and its QEMU."""

    name: str
    version: tuple[int, int, int]
    machine_type: str
    kvm: bool
    machine_checks: bool
    """Whether the guest's CPU model takes machine checks."""
    vcpu_threads: tuple[int, ...]
    devices: tuple[str, ...]
    """QOM types of the devices that were added."""
    networks: tuple[str, ...]
    """Types of network backends."""
    confidential: str = ""
    """The object that encrypts the guest's memory."""
    blocked: tuple[str, ...] = ()
    """Why QEMU itself would not migrate."""

    @property
    def platform(self) -> str:
        return f"x86_64/qemu-{'kvm' if self.kvm else 'tcg'}/{self.machine_type}"

    @property
    def tells_addresses(self) -> bool:
        return self.version >= TELLS_ADDRESSES


@dataclass(frozen=True, slots=True)
class Profile:
    """The properties that two QEMUs must share. `memory`: GPA and size of each region."""

    version: tuple[int, int, int]
    machine_type: str
    kvm: bool
    vcpus: int
    memory: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """One QEMU at one moment."""

    pid: int
    machine: Machine
    memory: tuple[HostMemory, ...]
    small_blocks: tuple[RamBlock, ...]
    unmapped: tuple[str, ...] = field(default=())
    """Memory backends that the guest does not see as plain RAM."""

    @property
    def layout(self) -> MemoryLayout:
        return MemoryLayout(
            tuple(MemoryRegion(one.region.gpa, one.region.size, one.page_size, one.backing) for one in self.memory)
        )

    @property
    def profile(self) -> Profile:
        memory = tuple((one.region.gpa, one.region.size) for one in self.memory)
        machine = self.machine
        return Profile(machine.version, machine.machine_type, machine.kvm, len(machine.vcpu_threads), memory)

    @property
    def memory_kind(self) -> MemoryKind:
        """The pages and backing of all regions; empty where they differ: then a destination must equal its source."""
        kinds = {(one.page_size, one.backing) for one in self.memory}
        if len(kinds) != 1:
            return MemoryKind()
        ((page_size, backing),) = kinds
        return MemoryKind(page_size, backing)


def devices_of(properties: Sequence[QomProperty]) -> tuple[str, ...]:
    """The types of the children of a QOM container."""
    return tuple(
        one.type.removeprefix("child<").removesuffix(">") for one in properties if one.type.startswith("child<")
    )


def networks_of(text: str) -> tuple[str, ...]:
    """Types of network devices and backends, from `info network`: "net0: index=0,type=tap,ifname=tap0"."""
    return tuple(re.findall(r"\btype=([a-z0-9-]+)", text))
