"""The time for which vmferry stops a thread of an adopted QEMU to run a system call there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vmferry.demo.options import GuestShape
from vmferry.demo.processes import Process
from vmferry.demo.programs import find_program
from vmferry.demo.qemu.image import make_image
from vmferry.demo.qemu.program import chosen_qemu
from vmferry.demo.qemu.vm import Shape, Sockets, arguments, monitor_of
from vmferry.units import MIB
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process as ProcessId
from vmferry.vmm.qemu.reach import ReachProgram
from vmferry.vmm.qemu.survey import Surveyor
from vmferry_bench.native import BenchError

TIMES = 100
MEMORY_MIB = 64
WITHIN_S = 20.0


async def injections() -> list[float]:
    """µs of each stop, while the guest is busy; none without a QEMU. Raises: BenchError if a vCPU was stopped."""
    program = chosen_qemu("")
    if program is None:
        return []
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-") as name:
        root = Path(name)
        guest = GuestShape(memory=MEMORY_MIB * MIB, vcpus=1)
        shape = Shape("bench", MEMORY_MIB, 1, "memfd", await make_image(root, guest))
        sockets = Sockets(root / "daemon", root / "own")
        process = await Process.start("QEMU", [*program.argv, *arguments(shape, sockets)], root / "log")
        try:
            monitor = await monitor_of(process, sockets.own)
            try:
                return await _injected(monitor)
            finally:
                await monitor.close()
        finally:
            await process.kill()


async def _injected(monitor: Monitor) -> list[float]:
    reach = ReachProgram(lambda: str(find_program("vmferry-reach")), WITHIN_S)
    surveyor = Surveyor(monitor, reach, WITHIN_S)
    process = ProcessId.of(await surveyor.process_id())
    try:
        vcpus = (await surveyor.machine()).vcpu_threads
        injection = pb.Injection(excluded_threads=vcpus, seccomp=pb.SECCOMP_POLICY_TRUST)
        found: list[float] = []
        for _ in range(TIMES):
            reply, _ = await reach.call(process, pb.ReachRequest(probe=pb.ProbeRequest(injection=injection)))
            if any(call.thread in vcpus for call in reply.calls):
                raise BenchError("vmferry: a vCPU was stopped for a system call")
            found += [float(call.stopped_us) for call in reply.calls]
        return found
    finally:
        os.close(process.pidfd)
