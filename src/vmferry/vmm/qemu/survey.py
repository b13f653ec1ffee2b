"""Collects the facts of a QEMU: from its monitor, and from the kernel about its memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import Reason, VmferryError
from vmferry.units import Hva
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu import facts as f
from vmferry.vmm.qemu.memory_map import (
    GuestRegion,
    RamBlock,
    backend_block,
    guest_regions,
    host_address,
    mapped_runs,
    ram_blocks,
    region_address,
)
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process, Reach, ranges

CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_KINDS = {
    pb.MAPPING_KIND_ANONYMOUS: f.Kind.ANONYMOUS,
    pb.MAPPING_KIND_MEMFD: f.Kind.MEMFD,
    pb.MAPPING_KIND_TMPFS: f.Kind.TMPFS,
    pb.MAPPING_KIND_HUGETLBFS: f.Kind.HUGETLBFS,
    pb.MAPPING_KIND_FILE: f.Kind.FILE,
}


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts, and a descriptor for each file of guest memory, which are the owner's to close."""

    facts: f.Facts
    files: tuple[int, ...]


class Surveyor:
    """Asks one QEMU. `within_s`: for each command."""

    def __init__(self, monitor: Monitor, reach: Reach, within_s: float) -> None:
        self._monitor = monitor
        self._reach = reach
        self._within_s = within_s

    async def process_id(self) -> int:
        """The process of the vCPUs: the peer of the monitor may be another one, which made the socket."""
        thread = (await self._cpus())[0].thread_id
        try:
            status = Path(f"/proc/{thread}/status").read_text(errors="surrogateescape")  # noqa: ASYNC240 procfs does not block
        except OSError as error:
            raise self._strange(f"names thread {thread}, which is not on this host ({error})") from error
        found = re.search(r"^Tgid:\s+(\d+)$", status, re.MULTILINE)
        return int(found[1]) if found else thread

    async def _cpus(self) -> list[f.CpuInfo]:
        """At least one."""
        cpus = await self._ask(list[f.CpuInfo], "query-cpus-fast")
        if not cpus:
            raise self._strange("has no vCPU")
        return cpus

    async def machine(self) -> f.Machine:
        version = (await self._ask(f.VersionInfo, "query-version")).qemu
        cpus = await self._cpus()
        machine_type = await self._qom(str, "/machine", "type")
        devices = [
            one
            for container in CONTAINERS
            for one in f.devices_of(await self._ask(list[f.QomProperty], "qom-list", path=container))
        ]
        blocked = (await self._ask(f.MigrationInfo, "query-migrate")).blocked_reasons
        return f.Machine(
            name=(await self._ask(f.NameInfo, "query-name")).name,
            version=(version.major, version.minor, version.micro),
            machine_type=machine_type.removesuffix("-machine"),
            kvm=(await self._ask(f.KvmInfo, "query-kvm")).enabled,
            machine_checks=await self._flag(cpus[0].qom_path, "mce") and await self._flag(cpus[0].qom_path, "mca"),
            vcpu_threads=tuple(cpu.thread_id for cpu in cpus),
            devices=tuple(devices),
            networks=f.networks_of(await self._monitor.human("info network", self._within_s)),
            confidential=await self._confidential(),
            blocked=tuple(blocked),
        )

    async def facts(self, process: Process, open_files: int = pb.OPEN_BACKING_UNSPECIFIED) -> Survey:
        """All facts; with the files of guest memory where they are to be opened."""
        machine = await self.machine()
        blocks = await self.blocks()
        backends = [one.id for one in await self._ask(list[f.MemdevInfo], "query-memdev")]
        names = {name for one in backends if (name := backend_block(one, blocks))}
        runs = mapped_runs(await self._monitor.human("info mtree -f", self._within_s))
        regions = guest_regions(runs, [blocks[name] for name in sorted(names)])
        seen = {region.block for region in regions}
        memory, files = await self._host_memory(process, regions, blocks, open_files)
        small = tuple(block for name, block in blocks.items() if name not in names)
        unmapped = tuple(sorted(names - seen))
        return Survey(f.Facts(process.pid, machine, memory, small, unmapped), files)

    async def blocks(self) -> dict[str, RamBlock]:
        return ram_blocks(await self._monitor.human("info ramblock", self._within_s))

    async def _host_memory(
        self, process: Process, regions: Sequence[GuestRegion], blocks: dict[str, RamBlock], open_files: int
    ) -> tuple[tuple[f.HostMemory, ...], tuple[int, ...]]:
        addresses = [await self._address(region, blocks[region.block]) for region in regions]
        wanted = ranges([(hva, region.size) for hva, region in zip(addresses, regions, strict=True)])
        request = pb.ReachRequest(
            describe=pb.DescribeRequest(ranges=wanted, open_backing=open_files)  # type: ignore[arg-type]
        )
        reply, files = await self._reach.call(process, request)
        pieces = iter(reply.describe.mappings)
        memory = tuple(_joined(region, hva, pieces) for hva, region in zip(addresses, regions, strict=True))
        return memory, tuple(files)

    async def _address(self, region: GuestRegion, block: RamBlock) -> Hva:
        if block.hva is not None:
            return Hva(block.hva + region.offset)
        answer = await self._monitor.human(f"gpa2hva {region.seen:#x}", self._within_s)
        return region_address(region, host_address(answer, region.block))

    async def _confidential(self) -> str:
        try:
            return await self._qom(str, "/machine", "confidential-guest-support")
        except VmferryError as error:
            if error.reason is not Reason.VMM_REFUSED:
                raise
            return ""  # a machine type without this property

    async def _flag(self, path: str, name: str) -> bool:
        try:
            return await self._qom(bool, path, name)
        except VmferryError as error:
            if error.reason is not Reason.VMM_REFUSED:
                raise
            return False

    async def _qom(self, kind: type[f.Answer], path: str, name: str) -> f.Answer:
        return await self._ask(kind, "qom-get", path=path, property=name)

    async def _ask(self, kind: type[f.Answer], command: str, **arguments: object) -> f.Answer:
        return await self._monitor.ask_for(kind, command, self._within_s, arguments)

    def _strange(self, what: str) -> VmferryError:
        return VmferryError(
            Reason.VMM_PROTOCOL, f"QEMU at {self._monitor.path} {what}.", "Run vmferryd in QEMU's pid namespace."
        )


def _joined(region: GuestRegion, hva: Hva, pieces: Iterator[pb.Mapping]) -> f.HostMemory:
    """The mappings of a region as one: of one kind, and of one stretch of a file. Raises: VmferryError VMM_REFUSED."""
    first = next(pieces)
    last = first
    while last.start + last.size < hva + region.size:
        after = next(pieces)
        if (after.kind, after.shared, after.inode, after.device, after.page_size) != (
            *(first.kind, first.shared, first.inode, first.device, first.page_size),
        ) or (first.HasField("inode") and after.offset - first.offset != after.start - first.start):
            raise VmferryError(
                Reason.VMM_REFUSED,
                f"Memory {region.block} is made of different mappings, from {after.start:#x} on.",
                "Give the VM one memory backend.",
            )
        last = after
    kind = _KINDS.get(first.kind, f.Kind.FILE)
    file = first.descriptor if first.HasField("descriptor") else None
    return f.HostMemory(region, hva, kind, first.shared, first.page_size, first.path, first.offset, file)
