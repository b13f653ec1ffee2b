"""Two pagers between a VMM of one thread each, and no push. Daemons have no part in a fault, so there is none here:
this module makes their calls to the pagers."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from vmferry.demo.network import loopback_places
from vmferry.demo.processes import Process
from vmferry.demo.programs import find_program
from vmferry.units import MIB, PAGE_4K
from vmferry.v1 import common_pb2, pager_pb2
from vmferry.v1.pager_pb2_grpc import PagerStub
from vmferry_bench.native import BenchError, program

if TYPE_CHECKING:  # a name of the stubs' types only
    from vmferry.v1.pager_pb2_grpc import PagerAsyncStub

MEMORY_MIB = 64
PATIENCE_S = 30.0
TOKEN = "bench"  # not a secret: of a lane on loopback that lives a second
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
)
_BACKINGS = {"anonymous": common_pb2.BACKING_ANONYMOUS, "memfd": common_pb2.BACKING_MEMFD}


def layout(backing: str, memory_mib: int) -> common_pb2.MemoryLayout:
    """One region."""
    region = common_pb2.MemoryRegion(gpa=0, size=memory_mib * MIB, page_size=PAGE_4K, backing=_BACKINGS[backing])
    return common_pb2.MemoryLayout(regions=[region])


def memory_error(page: int) -> common_pb2.MemoryError:
    """One that an operator told of."""
    return common_pb2.MemoryError(gpa=page * PAGE_4K, lsb=12, origin=common_pb2.ERROR_ORIGIN_OPERATOR, count=1)


@dataclass(frozen=True, slots=True)
class Touches:
    """µs of each touch, in order, and which pages were poison or had wrong content."""

    us: list[float]
    poison: list[int]
    wrong: list[int]


class SmallVmm:
    """The Rust program as VMM: one line of its output for each of its input."""

    def __init__(self, inner: asyncio.subprocess.Process) -> None:
        self._inner = inner

    @classmethod
    async def start(cls, *arguments: str, memory_mib: int) -> SmallVmm:
        pipe = asyncio.subprocess.PIPE
        inner = await asyncio.create_subprocess_exec(
            program(),
            *arguments,
            "--vm",
            "bench",
            "--memory-mib",
            str(memory_mib),
            stdin=pipe,
            stdout=pipe,
            limit=1 << 22,
        )
        vmm = cls(inner)
        await vmm._line()
        return vmm

    async def _line(self) -> str:
        if self._inner.stdout is None:
            raise BenchError("the small VMM has no output")
        async with asyncio.timeout(PATIENCE_S * 4):
            line = await self._inner.stdout.readline()
        if not line:
            raise BenchError("the small VMM ended")
        return line.decode()

    async def touch(self, pages: Sequence[int], pause_us: int) -> Touches:
        if self._inner.stdin is None:
            raise BenchError("the small VMM has no input")
        self._inner.stdin.write(json.dumps({"pages": list(pages), "pause_us": pause_us}).encode() + b"\n")
        return Touches(**json.loads(await self._line()))

    async def end(self) -> None:
        if self._inner.returncode is None:
            self._inner.kill()
        await self._inner.wait()


@dataclass(frozen=True, slots=True)
class Pair:
    """A source pager with a frozen VMM, and a destination pager with a VMM that touches pages."""

    source: PagerAsyncStub
    destination: PagerAsyncStub
    vmm: SmallVmm


@dataclass(frozen=True, slots=True)
class Ends:
    """The CPUs of each end, as lists like `0` or `2-3`; empty: anywhere."""

    source: str = ""
    destination: str = ""


ANYWHERE = Ends()


def apart() -> Ends:
    """Each end on a CPU of its own, as on two hosts; where there is only one: anywhere."""
    first, *others = sorted(os.sched_getaffinity(0))
    return Ends(str(first), str(others[0])) if others else ANYWHERE


@asynccontextmanager
async def pagers(backing: str, ends: Ends = ANYWHERE, memory_mib: int = MEMORY_MIB) -> AsyncIterator[Pair]:
    """Connected, without push."""
    memory = layout(backing, memory_mib)
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-bench-")))
        for name in "sd":
            (root / name).mkdir()  # two directories in /tmp
        placed = ("--page-path-cpus", ends.source, "--lane-cpus", ends.source)
        source, _ = await pager(stack, root / "s", "source", *placed)
        first, last = loopback_places(1)[0].page_ports
        serving = await source.ServeSource(
            pager_pb2.ServeSourceRequest(
                layout=memory, listen_ip="127.0.0.1", port_first=first, port_last=last, token=TOKEN
            )
        )
        hold = ("hold", str(root / "s" / "memory.sock"), "--backing", backing)
        holder = await SmallVmm.start(*hold, memory_mib=memory_mib)
        stack.push_async_callback(holder.end)
        await source.Freeze(pager_pb2.FreezeRequest())
        destination, _ = await pager(stack, root / "d", "destination", "--page-path-cpus", ends.destination)
        expected = await destination.ExpectDestination(pager_pb2.ExpectDestinationRequest(layout=memory))
        features = ",".join(expected.uffd_features)
        touch = ("touch", str(root / "d" / "memory.sock"), "--features", features, "--backing", backing)
        vmm = await SmallVmm.start("--cpus", ends.destination, *touch, memory_mib=memory_mib)
        stack.push_async_callback(vmm.end)
        held = (await source.ListHeld(pager_pb2.ListHeldRequest())).held
        await destination.Preallocate(pager_pb2.PreallocateRequest(held=held))
        await destination.ConnectLanes(
            pager_pb2.ConnectLanesRequest(
                lane_address=serving.lane_address,
                token=TOKEN,
                demand_timeout_s=PATIENCE_S,
                connect_timeout_s=PATIENCE_S,
            )
        )
        yield Pair(source, destination, vmm)


async def pager(stack: AsyncExitStack, directory: Path, role: str, *options: str) -> tuple[PagerAsyncStub, Process]:
    """A pager of one role: its control, and itself."""
    always = ("--runtime-dir", str(directory), "--vm", "bench", "--role", role)
    argv = [str(find_program("vmferry-pager")), *always, *options]
    process = await Process.start(f"{role}'s pager", argv, directory / "log")
    stack.push_async_callback(process.kill)
    address = f"unix:{directory}/pager.sock"
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=_OPTIONS))
    control: PagerAsyncStub = PagerStub(channel)
    await control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S, wait_for_ready=True)
    return control, process
