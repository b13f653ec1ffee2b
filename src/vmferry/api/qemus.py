"""The Qemus service: adopts QEMUs and tells whether they can be moved."""

from __future__ import annotations

from pathlib import Path

from vmferry.api.answer import Context, answered, invalid
from vmferry.api.control import QemuControl
from vmferry.api.validation import Checks
from vmferry.v1 import qemus_pb2 as pb
from vmferry.v1.qemus_pb2_grpc import QemusServicer as GeneratedServicer
from vmferry.vmm.qemu.facts import Profile
from vmferry.vmm.qemu.findings import Finding, Weight, pair_findings

_WEIGHTS = {Weight.WARNING: pb.QEMU_FINDING_WEIGHT_WARNING, Weight.REFUSED: pb.QEMU_FINDING_WEIGHT_REFUSED}


class QemusServicer(GeneratedServicer):
    """`VmferryError` of the control becomes the call's status."""

    def __init__(self, control: QemuControl) -> None:
        self._control = control

    async def AdoptQemu(self, request: pb.AdoptQemuRequest, context: Context) -> pb.AdoptQemuResponse:  # noqa: N802
        return await answered(context, self._adopt(request))

    async def CheckQemu(self, request: pb.CheckQemuRequest, context: Context) -> pb.CheckQemuResponse:  # noqa: N802
        return await answered(context, self._check(request))

    async def _adopt(self, request: pb.AdoptQemuRequest) -> pb.AdoptQemuResponse:
        checks = Checks()
        checks.vm(request.vm, optional=True)
        checks.done()
        if not request.monitor.startswith("/") or "\0" in request.monitor:
            raise invalid("monitor", f"must be an absolute path, is {request.monitor!r}")
        identity = (await self._control.adopt(Path(request.monitor), request.vm)).identity
        return pb.AdoptQemuResponse(vm=identity.vm, vmm_pid=identity.pid, state=identity.state)

    async def _check(self, request: pb.CheckQemuRequest) -> pb.CheckQemuResponse:
        checks = Checks()
        checks.vm(request.vm)
        checks.done()
        found = await self._control.check(request.vm)
        findings = list(found.findings)
        if request.HasField("destination"):
            findings += pair_findings(found.profile, _profile(request.destination))
        return pb.CheckQemuResponse(
            profile=_to_pb(found.profile), findings=map(_finding, findings), command=found.command
        )


def _profile(message: pb.QemuProfile) -> Profile:
    major, minor, micro, *_ = *message.version, 0, 0, 0
    memory = tuple((one.gpa, one.size) for one in message.memory)
    return Profile((major, minor, micro), message.machine_type, message.kvm, message.vcpus, memory)


def _to_pb(profile: Profile) -> pb.QemuProfile:
    return pb.QemuProfile(
        version=profile.version,
        machine_type=profile.machine_type,
        kvm=profile.kvm,
        vcpus=profile.vcpus,
        memory=[pb.QemuMemory(gpa=gpa, size=size) for gpa, size in profile.memory],
    )


def _finding(one: Finding) -> pb.QemuFinding:
    return pb.QemuFinding(weight=_WEIGHTS[one.weight], fact=one.fact, remedy=one.remedy)
