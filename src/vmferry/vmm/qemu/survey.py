"""Collects the facts of a QEMU: from its monitor, and from the kernel about its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vmferry.errors import Reason, VmferryError
from vmferry.units import Hva
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.process import process_of_thread
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
from vmferry.vmm.qemu.reach import Process, Reach, close_all, ranges

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
        peer, address = self._monitor.peer
        found = await asyncio.to_thread(process_of_thread, thread, peer, address)
        if found is None:
            raise VmferryError(
                Reason.VMM_GONE,
                f"QEMU at {self._monitor.path} names thread {thread}, and no process with it serves this monitor here.",
                "Run vmferryd on QEMU's host, in the same pid namespace or an outer one, with CAP_SYS_PTRACE.",
            )
        return found

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
        addresses = [await self._address(region, blocks[region.block]) for region in regions]
        reply, files = await self._describe(process, list(zip(regions, addresses, strict=True)), machine, open_files)
        pieces = iter(reply.mappings)
        try:
            memory = tuple(_joined(region, hva, pieces) for region, hva in zip(regions, addresses, strict=True))
        except BaseException:
            close_all(files)
            raise
        machine = replace(machine, vcpu_threads=_threads_here(machine.vcpu_threads, reply.threads))
        small = tuple(block for name, block in blocks.items() if name not in names)
        unmapped = tuple(sorted(names - seen))
        return Survey(f.Facts(process.pid, machine, memory, small, unmapped), files)

    async def blocks(self) -> dict[str, RamBlock]:
        return ram_blocks(await self._monitor.human("info ramblock", self._within_s))

    async def _describe(
        self, process: Process, regions: Sequence[tuple[GuestRegion, Hva]], machine: f.Machine, open_files: int
    ) -> tuple[pb.DescribeReply, tuple[int, ...]]:
        wanted = pb.DescribeRequest(
            ranges=ranges([(hva, region.size) for region, hva in regions]),
            threads=machine.vcpu_threads,
            open_backing=open_files,  # type: ignore[arg-type]
        )
        reply, files = await self._reach.call(process, pb.ReachRequest(describe=wanted))
        return reply.describe, tuple(files)

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
            Reason.VMM_PROTOCOL,
            f"QEMU at {self._monitor.path} {what}.",
            "Report it: this QEMU is not known.",
        )


def _threads_here(threads: Sequence[int], found: Iterable[pb.ThreadIdentity]) -> tuple[int, ...]:
    """The numbers of threads in the daemon's pid namespace."""
    here = {one.thread: one.host_thread for one in found if one.host_thread}
    return tuple(here.get(thread, thread) for thread in threads)


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
