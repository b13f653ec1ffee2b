"""What a QEMU does as the destination of a move: started with `-S -incoming defer`.

```
 prepare ─▶ load ─▶ start (cont) ─▶ complete
    └─▶ reset  └─▶ reset (quit): a QEMU that has taken a state takes no other
```
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryLayout
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu.adopted import Adopted, close_survey
from vmferry.vmm.qemu.facts import Facts
from vmferry.vmm.qemu.findings import destination_findings, refuse_if_any
from vmferry.vmm.qemu.mark import Mark
from vmferry.vmm.qemu.reach import close_all, ranges

DEVICE = "/dev/userfaultfd"
STATE_FD = "vmferry-state"
CAPABILITIES = {"events": True, "late-block-activate": True, "x-ignore-shared": False, "postcopy-ram": False}


class QemuDestination:
    """The destination side of one QEMU; its owner calls one method at a time."""

    def __init__(self, qemu: Adopted) -> None:
        self._qemu = qemu

    async def prepare(self, layout: MemoryLayout, vcpus: int, features: Sequence[str], socket: Path) -> None:
        """Makes sure that the memory is empty, has the pager serve it, and attaches it."""
        survey = await self._qemu.survey(pb.OPEN_BACKING_READ_WRITE)
        try:
            await self._qemu.set_capabilities(CAPABILITIES)
            refuse_if_any(self._qemu.vm, destination_findings(survey.facts))
            self._check(survey.facts, layout, vcpus)
            uffd, number = await self._userfaultfd(survey.facts, features)
            try:
                await self._qemu.marks.replace(Mark("prepared", number))
                await self._qemu.attach(socket, "destination", survey, uffd)
            finally:
                os.close(uffd)
        finally:
            close_survey(survey)

    async def load(self, state: bytes) -> None:
        qemu = self._qemu
        mark = await qemu.marks.read()
        await qemu.marks.put(Mark("loading", mark.uffd if mark else None))
        memory = os.memfd_create("vmferry-state", os.MFD_CLOEXEC)
        try:
            _write(memory, state)
            os.lseek(memory, 0, os.SEEK_SET)
            await qemu.monitor.get_fd(memory, STATE_FD, qemu.within_s)
        finally:
            os.close(memory)
        await qemu.ask("migrate-incoming", qemu.deadlines.load_state_s, uri=f"fd:{STATE_FD}")
        await qemu.until_migrated(qemu.deadlines.load_state_s)
        if (status := await qemu.status()) != "paused":
            raise qemu.error(Reason.VMM_REFUSED, f"is {status!r} with the state loaded, not paused: start it with -S")

    async def start(self) -> None:
        """Lets the vCPUs run. `cont` in any other state than paused would do something else."""
        status = await self._qemu.status()
        if status == "running":
            return
        if status != "paused":
            raise self._qemu.error(Reason.VMM_REFUSED, f"is {status!r}, not paused with the state loaded")
        await self._qemu.ask("cont", self._qemu.deadlines.start_s)
        mark = await self._qemu.marks.read()
        await self._qemu.marks.replace(Mark("running", mark.uffd if mark else None))

    async def complete(self, keep_uffd: bool) -> None:
        """All pages are there. The userfaultfd stays while poisoned pages are guarded."""
        mark = await self._qemu.marks.read()
        if keep_uffd or mark is None:
            return
        await self._close_userfaultfd(mark)
        await self._qemu.marks.replace(None)

    async def reset(self, loaded: bool) -> None:
        """Everything is given back."""
        if loaded:
            await self._qemu.end_process()
            return
        self._qemu.attached = None
        mark = await self._qemu.marks.read()
        if mark is not None:
            await self._close_userfaultfd(mark)
        await self._qemu.marks.replace(None)

    def _check(self, facts: Facts, layout: MemoryLayout, vcpus: int) -> None:
        own = facts.layout
        if own != layout:
            raise VmferryError(
                Reason.LAYOUT_MISMATCH,
                f"Memory of {self._qemu.vm} lies at {_places(layout)} on the source, at {_places(own)} in the "
                "waiting QEMU.",
                "Give the waiting QEMU the source's -m, -numa and memory options.",
            )
        if len(facts.machine.vcpu_threads) != vcpus:
            have = len(facts.machine.vcpu_threads)
            raise self._qemu.error(Reason.VMM_REFUSED, f"has {have} vCPUs, the VM {vcpus}: start it with -smp {vcpus}")

    async def _userfaultfd(self, facts: Facts, features: Sequence[str]) -> tuple[int, int]:
        """A copy of a userfaultfd of QEMU's with all guest memory, and its number there."""
        qemu = self._qemu
        injection = pb.Injection(excluded_threads=facts.machine.vcpu_threads, seccomp=pb.SECCOMP_POLICY_TRUST)
        memory = ranges([(one.hva, one.region.size) for one in facts.memory])
        empty = pb.EmptyRequest(ranges=memory, discard=True, injection=injection)
        await qemu.reach.call(qemu.process, pb.ReachRequest(empty=empty))
        device = _open_device()
        try:
            added = await qemu.give_fd(device)
        finally:
            os.close(device)
        try:
            create = pb.CreateUserfaultfdRequest(ranges=memory, features=features, device=added.fd, injection=injection)
            reply, descriptors = await qemu.reach.call(qemu.process, pb.ReachRequest(create_userfaultfd=create))
        finally:
            await qemu.take_fd_back(added)
        if len(descriptors) != 1:
            close_all(descriptors)
            raise qemu.error(Reason.INTERNAL, f"gave {len(descriptors)} userfaultfds")
        return descriptors[0], reply.create_userfaultfd.descriptor_in_process

    async def _close_userfaultfd(self, mark: Mark) -> None:
        if mark.uffd is None:
            return
        injection = pb.Injection(seccomp=pb.SECCOMP_POLICY_TRUST)
        request = pb.CloseUserfaultfdRequest(descriptor=mark.uffd, injection=injection)
        await self._qemu.reach.call(self._qemu.process, pb.ReachRequest(close_userfaultfd=request))


def _open_device() -> int:
    """Raises: VmferryError KERNEL_LACKS_FEATURE."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VmferryError(
            Reason.KERNEL_LACKS_FEATURE, f"{DEVICE} cannot be opened: {error}.", "Give vmferryd read and write access."
        ) from error


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _places(layout: MemoryLayout) -> str:
    return ", ".join(f"{one.gpa:#x}+{one.size:#x} ({one.backing} of {one.page_size})" for one in layout.regions)
