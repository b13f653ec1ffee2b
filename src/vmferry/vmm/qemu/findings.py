"""Why a QEMU cannot be moved, or not as its operator may expect: from facts to findings, each with a remedy. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import layout_problem
from vmferry.vmm.qemu.facts import Facts, Kind, Profile

_MAPS_MEMORY = ("vhost-user", "virtio-vhost-user", "ivshmem")
_PINS_MEMORY = ("vfio", "vhost-vdpa")


class Weight(StrEnum):
    REFUSED = "refused"
    """The VM is not moved."""
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """`fact` names the object and its actual value, `remedy` the change that helps."""

    weight: Weight
    fact: str
    remedy: str


def source_findings(facts: Facts) -> list[Finding]:
    """Of a QEMU that runs the VM."""
    found = [*_of_either(facts)]
    found += [_refused(f"QEMU does not migrate it: {reason}", _BLOCKED) for reason in facts.machine.blocked]
    if not facts.machine.tells_addresses:
        found += [
            _refused(
                f"Memory {one.region.block} is {one.kind}, not shared, and QEMU {_dotted(facts.machine.version)} saves "
                "only VMs with shared memory",
                "Start the VM with -object memory-backend-memfd,share=on, or with QEMU 8.2 or newer.",
            )
            for one in facts.memory
            if not one.shared
        ]
    return found


def destination_findings(facts: Facts) -> list[Finding]:
    """Of a QEMU that waits for the VM."""
    found = [*_of_either(facts)]
    for one in facts.memory:
        if one.kind is Kind.FILE:
            found.append(
                _refused(
                    f"Memory {one.region.block} is {one.kind} ({one.path}), which takes no pages on demand",
                    "Start the waiting QEMU with -object memory-backend-memfd,share=on.",
                )
            )
        elif one.region.gpa == 0 and one.kind is not Kind.HUGETLBFS and one.hva % (2 << 20):
            found.append(
                Finding(
                    Weight.WARNING,
                    f"Memory {one.region.block} begins at {one.hva:#x}: not on 2 MiB, so it gets no huge pages",
                    "Use -object memory-backend-file,share=on,align=2M with a mem-path on a tmpfs.",
                )
            )
    return found


def pair_findings(source: Profile, destination: Profile) -> list[Finding]:
    """Differences between two QEMUs that must be equal."""
    found = []
    if source.machine_type != destination.machine_type:
        found.append(
            _refused(
                f"The machine type is {source.machine_type} on the source, {destination.machine_type} on the "
                "destination",
                f"Start the waiting QEMU with -machine {source.machine_type}: an alias such as pc or q35 stands for "
                "another type in another version.",
            )
        )
    if source.kvm != destination.kvm:
        found.append(_refused("One of the two QEMUs has KVM, the other has not", "Use the same accelerator on both."))
    if source.vcpus != destination.vcpus:
        found.append(
            _refused(
                f"The VM has {source.vcpus} vCPUs, the waiting QEMU {destination.vcpus}",
                f"Start the waiting QEMU with -smp {source.vcpus}.",
            )
        )
    if source.memory != destination.memory:
        found.append(
            _refused(
                f"Memory lies at {_ranges(source.memory)} on the source, at {_ranges(destination.memory)} on the "
                "destination",
                "Give the waiting QEMU the same -m, -numa and memory devices.",
            )
        )
    if destination.version < source.version:
        found.append(
            Finding(
                Weight.WARNING,
                f"The waiting QEMU {_dotted(destination.version)} is older than the source's {_dotted(source.version)}",
                "QEMU promises migration to the same or a newer version only.",
            )
        )
    return found


def refuse_if_any(vm: str, findings: Sequence[Finding]) -> None:
    """Raises: VmferryError VMM_REFUSED with every finding that forbids the move."""
    grave = [one for one in findings if one.weight is Weight.REFUSED]
    if grave:
        raise VmferryError(
            Reason.VMM_REFUSED,
            f"QEMU of {vm} cannot be moved: " + "; ".join(one.fact for one in grave) + ".",
            " ".join(one.remedy for one in grave),
        )


_BLOCKED = "Remove the device or CPU feature that it names."


def _of_either(facts: Facts) -> Iterator[Finding]:
    machine = facts.machine
    for device in machine.devices:
        if device.startswith(_MAPS_MEMORY):
            yield _refused(
                f"Device {device} lets another process map guest memory: missing pages read as zeros there",
                "Use a device that QEMU or the kernel serves.",
            )
        if device.startswith(_PINS_MEMORY):
            yield _refused(f"Device {device} pins guest memory", "Unplug it for the move.")
    for network in machine.networks:
        if network.startswith((*_MAPS_MEMORY, *_PINS_MEMORY)):
            yield _refused(f"Network backend {network} maps or pins guest memory", "Use tap, with or without vhost.")
    if machine.confidential:
        yield _refused(
            f"The guest's memory is encrypted by {machine.confidential}", "Such a VM can only be restarted elsewhere."
        )
    for block in facts.unmapped:
        yield _refused(
            f"The guest does not see memory backend {block} as plain RAM", "Remove virtio-mem, virtio-pmem or NVDIMM."
        )
    problem = layout_problem(facts.layout)
    if problem:
        yield _refused(f"Guest memory cannot be moved: {problem[0]} {problem[1]}", "Change the memory options.")
    if not machine.kvm:
        yield Finding(
            Weight.WARNING,
            "Without KVM a guest that touches a poisoned page ends its QEMU",
            "Do not move a VM with memory errors under TCG.",
        )
    elif not machine.machine_checks:
        yield Finding(
            Weight.WARNING,
            "The CPU model has no machine checks: a poisoned page ends QEMU",
            "Leave mce and mca in the -cpu option.",
        )


def _refused(fact: str, remedy: str) -> Finding:
    return Finding(Weight.REFUSED, fact, remedy)


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{gpa:#x}+{size:#x}" for gpa, size in ranges) or "no address"
