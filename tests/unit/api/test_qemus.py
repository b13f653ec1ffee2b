"""The Qemus service: requests in, findings out."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.api.qemus import QemusServicer
from vmferry.errors import VmferryError
from vmferry.testing.vmm import identity
from vmferry.v1 import qemus_pb2 as pb
from vmferry.vmm.qemu.facts import Profile
from vmferry.vmm.qemu.findings import Finding, Weight
from vmferry.vmm.qemu.vmm import QemuCheck

PROFILE = Profile((7, 2, 22), "pc-i440fx-7.2", True, 2, ((0, 1 << 26),))


class Adopted:
    def __init__(self, vm: str) -> None:
        self.identity = identity(vm)


class Control:
    """Knows one VM."""

    def __init__(self) -> None:
        self.adopted: list[tuple[Path, str]] = []

    async def adopt(self, path: Path, vm: str) -> Adopted:
        self.adopted.append((path, vm))
        return Adopted(vm or "own-name")

    async def check(self, vm: str) -> QemuCheck:
        assert vm == "web-1"
        return QemuCheck(PROFILE, [Finding(Weight.WARNING, "fact", "remedy")], ["qemu", "-m", "64"])


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
def servicer(control: Control) -> QemusServicer:
    return QemusServicer(control)  # type: ignore[arg-type]


async def test_a_monitor_is_adopted_under_a_name_or_its_own(servicer: QemusServicer, control: Control) -> None:
    for vm in ("web-1", ""):
        answer = await servicer.AdoptQemu(pb.AdoptQemuRequest(monitor="/run/x.qmp", vm=vm), None)  # type: ignore[arg-type]
        assert (answer.vm, answer.vmm_pid, answer.state) == (vm or "own-name", 100, "running")
    assert control.adopted == [(Path("/run/x.qmp"), "web-1"), (Path("/run/x.qmp"), "")]


@pytest.mark.parametrize(("monitor", "vm"), [("x.qmp", ""), ("", ""), ("/x\0", ""), ("/x", "no name")])
async def test_a_bad_request_adopts_nothing(servicer: QemusServicer, control: Control, monitor: str, vm: str) -> None:
    with pytest.raises(VmferryError):
        await servicer._adopt(pb.AdoptQemuRequest(monitor=monitor, vm=vm))
    assert control.adopted == []


async def test_a_check_tells_findings_profile_and_command(servicer: QemusServicer) -> None:
    alone = await servicer.CheckQemu(pb.CheckQemuRequest(vm="web-1"), None)  # type: ignore[arg-type]
    assert [(one.weight, one.fact, one.remedy) for one in alone.findings] == [
        (pb.QEMU_FINDING_WEIGHT_WARNING, "fact", "remedy")
    ]
    assert list(alone.command) == ["qemu", "-m", "64"]
    same = await servicer.CheckQemu(pb.CheckQemuRequest(vm="web-1", destination=alone.profile), None)  # type: ignore[arg-type]
    assert same.findings == alone.findings


async def test_differences_to_the_waiting_qemu_are_findings(servicer: QemusServicer) -> None:
    other = pb.QemuProfile(machine_type="pc-q35-7.2", kvm=True, vcpus=2, memory=[pb.QemuMemory(gpa=0, size=1 << 26)])
    found = await servicer.CheckQemu(pb.CheckQemuRequest(vm="web-1", destination=other), None)  # type: ignore[arg-type]
    facts = [one.fact for one in found.findings if one.weight == pb.QEMU_FINDING_WEIGHT_REFUSED]
    assert len(facts) == 1 and "pc-q35-7.2" in facts[0]
