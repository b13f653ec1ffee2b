"""Puts poison markers in the memory of a QEMU, so that its vCPUs take real machine checks (`UFFDIO_POISON`)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Sequence

from vmferry.errors import Reason, VmferryError
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu.destination import DEVICE
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process, Range, Reach, close_all, ranges
from vmferry.vmm.qemu.survey import Surveyor

UFFDIO_POISON = 0xC020AA08
"""include/uapi/linux/userfaultfd.h: _IOWR(UFFDIO, 0x08, struct uffdio_poison)."""
WITHIN_S = 20.0


async def poison_pages(monitor: Monitor, reach: Reach, pages: Sequence[Range]) -> None:
    """Each page loses its content. The vCPUs are stopped. Raises: VmferryError."""
    surveyor = Surveyor(monitor, reach, WITHIN_S)
    process = Process.of(await surveyor.process_id())
    try:
        vcpus = (await surveyor.machine()).vcpu_threads
        uffd = await _userfaultfd(monitor, reach, process, pages, vcpus)
        try:
            for start, size in pages:
                _mark(uffd, start, size)
        finally:
            os.close(uffd)
    finally:
        os.close(process.pidfd)


async def _userfaultfd(
    monitor: Monitor, reach: Reach, process: Process, pages: Sequence[Range], vcpus: Sequence[int]
) -> int:
    injection = pb.Injection(excluded_threads=vcpus, seccomp=pb.SECCOMP_POLICY_TRUST)
    where = ranges(pages)
    empty = pb.EmptyRequest(ranges=where, discard=True, injection=injection)
    await reach.call(process, pb.ReachRequest(empty=empty))
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        added = await monitor.add_fd(device, "vmferry-demo", WITHIN_S)
    finally:
        os.close(device)
    create = pb.CreateUserfaultfdRequest(
        ranges=where,
        features=["UFFD_FEATURE_POISON"],
        device=added.fd,
        close_in_process=True,
        injection=injection,
    )
    _, descriptors = await reach.call(process, pb.ReachRequest(create_userfaultfd=create))
    await monitor.ask("remove-fd", WITHIN_S, {"fdset-id": added.fdset_id})
    if len(descriptors) != 1:
        close_all(descriptors)
        raise VmferryError(Reason.INTERNAL, f"vmferry-reach gave {len(descriptors)} userfaultfds, not one.")
    return descriptors[0]


def _mark(uffd: int, start: int, size: int) -> None:
    while True:
        argument = bytearray(struct.pack("=QQQq", start, size, 0, 0))
        try:
            fcntl.ioctl(uffd, UFFDIO_POISON, argument)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                continue
            raise VmferryError(Reason.INTERNAL, f"No memory error could be made at {start:#x}: {error}.") from error
        return
