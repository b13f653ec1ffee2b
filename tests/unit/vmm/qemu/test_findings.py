"""Each reason why a QEMU is not moved, from facts; and that a plain one has none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing, MemoryKind
from vmferry.units import MIB, PAGE_2M, PAGE_4K, Gpa, Hva
from vmferry.vmm.qemu import facts as f
from vmferry.vmm.qemu.facts import Facts, HostMemory, Kind, Machine
from vmferry.vmm.qemu.findings import (
    Finding,
    Weight,
    destination_findings,
    pair_findings,
    refuse_if_any,
    source_findings,
)
from vmferry.vmm.qemu.memory_map import GuestRegion

REGION = GuestRegion(Gpa(0), 64 * MIB, "pc.ram", 0, PAGE_4K, Gpa(0))
MEMORY = HostMemory(REGION, Hva(0x7F00_0000_0000), Kind.MEMFD, True, PAGE_4K, "/memfd:x", 0, 0)
MACHINE = Machine("web-1", (7, 2, 22), "pc-i440fx-7.2", True, True, (100, 101), ("virtio-blk-pci",), ("tap",))
PLAIN = Facts(99, MACHINE, (MEMORY,), ())


def with_machine(**changes: object) -> Facts:
    return replace(PLAIN, machine=replace(MACHINE, **changes))  # type: ignore[arg-type]


def with_memory(**changes: object) -> Facts:
    return replace(PLAIN, memory=(replace(MEMORY, **changes),))  # type: ignore[arg-type]


def refused(findings: list[Finding]) -> str:
    """What is said of the one finding that forbids the move."""
    (found,) = [one for one in findings if one.weight is Weight.REFUSED]
    assert found.remedy
    return found.fact


def test_a_plain_vm_has_no_finding() -> None:
    assert source_findings(PLAIN) == destination_findings(PLAIN) == pair_findings(PLAIN.profile, PLAIN.profile) == []
    refuse_if_any("web-1", [])


@pytest.mark.parametrize("device", ["vhost-user-blk-pci", "vhost-user-fs-pci", "ivshmem-plain", "vfio-pci"])
def test_a_device_that_maps_or_pins_memory(device: str) -> None:
    for findings in (source_findings, destination_findings):
        assert device in refused(findings(with_machine(devices=("e1000", device))))


@pytest.mark.parametrize("network", ["vhost-user", "vhost-vdpa"])
def test_a_network_that_maps_memory(network: str) -> None:
    assert network in refused(source_findings(with_machine(networks=("tap", network))))


def test_migrations_that_qemu_itself_refuses() -> None:
    """`xen-save-devices-state` would not look at it."""
    reason = "State blocked by non-migratable CPU device (invtsc flag)"
    assert reason in refused(source_findings(with_machine(blocked=(reason,))))


def test_encrypted_memory() -> None:
    assert "/objects/sev0" in refused(source_findings(with_machine(confidential="/objects/sev0")))


def test_memory_that_the_guest_sees_otherwise() -> None:
    assert "vmem0" in refused(source_findings(replace(PLAIN, unmapped=("vmem0",))))


def test_no_memory_at_all() -> None:
    assert "regions" in refused(source_findings(replace(PLAIN, memory=())))


def test_an_old_qemu_saves_shared_memory_only() -> None:
    private = with_memory(kind=Kind.ANONYMOUS, shared=False)
    assert "anonymous memory" in refused(source_findings(private))
    assert destination_findings(private) == []
    newer = replace(private, machine=replace(MACHINE, version=(8, 2, 0)))
    assert source_findings(newer) == []


def test_memory_on_a_disk_waits_for_no_page() -> None:
    on_disk = with_memory(kind=Kind.FILE, path="/var/lib/ram")
    assert "/var/lib/ram" in refused(destination_findings(on_disk))
    assert source_findings(on_disk) == []


@pytest.mark.parametrize("machine", [{"kvm": False}, {"machine_checks": False}])
def test_a_guest_without_machine_checks_is_warned_of(machine: dict[str, object]) -> None:
    (found,) = source_findings(with_machine(**machine))
    assert found.weight is Weight.WARNING


def test_memory_that_gets_no_huge_pages_is_warned_of() -> None:
    (found,) = destination_findings(with_memory(hva=Hva(0x7F00_0000_1000)))
    assert found.weight is Weight.WARNING
    assert "0x7f0000001000" in found.fact


def test_the_alias_of_a_machine_type() -> None:
    other = with_machine(machine_type="pc-i440fx-10.0")
    assert "pc-i440fx-10.0" in refused(pair_findings(PLAIN.profile, other.profile))


def test_another_accelerator() -> None:
    assert "KVM" in refused(pair_findings(PLAIN.profile, with_machine(kvm=False).profile))


def test_another_number_of_vcpus() -> None:
    assert "2 vCPUs" in refused(pair_findings(PLAIN.profile, with_machine(vcpu_threads=(1,)).profile))


def test_another_layout() -> None:
    other = with_memory(region=replace(REGION, size=128 * MIB))
    assert "0x0+0x8000000" in refused(pair_findings(PLAIN.profile, other.profile))


def test_an_older_destination_is_warned_of() -> None:
    newer = with_machine(version=(10, 0, 2))
    (found,) = pair_findings(newer.profile, PLAIN.profile)
    assert found.weight is Weight.WARNING


def test_every_refusal_is_named_at_once() -> None:
    bad = with_machine(devices=("vfio-pci", "ivshmem-plain"))
    with pytest.raises(VmferryError) as caught:
        refuse_if_any("web-1", source_findings(bad))
    assert caught.value.reason is Reason.VMM_REFUSED
    assert "vfio-pci" in caught.value.message
    assert "ivshmem-plain" in caught.value.message


def test_facts_name_the_backing_of_memory() -> None:
    assert PLAIN.memory_kind == MemoryKind(PAGE_4K, Backing.MEMFD)
    assert with_memory(shared=False, kind=Kind.HUGETLBFS, page_size=PAGE_2M).memory_kind == MemoryKind(
        PAGE_2M, Backing.ANONYMOUS
    )
    second = replace(MEMORY, region=replace(REGION, gpa=Gpa(64 * MIB)), shared=False, kind=Kind.ANONYMOUS)
    assert replace(PLAIN, memory=(MEMORY, second)).memory_kind == MemoryKind()


def test_network_types_are_read_from_the_output_of_qemu() -> None:
    text = (
        "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ net0: index=0,type=vhost-user,ifname=x\nhub 0\n \\ hub0port0: type=tap,fd=3\n"
    )
    assert f.networks_of(text) == ("nic", "vhost-user", "tap")


def test_devices_are_the_children_of_a_container() -> None:
    listed = [f.QomProperty("type", "string"), f.QomProperty("disk0", "child<virtio-blk-pci>")]
    assert f.devices_of(listed) == ("virtio-blk-pci",)
