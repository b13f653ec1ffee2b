"""What is measured of vmferry alone: its two pagers between a VMM of one thread each, and no push; beside it the floor,
userfaultfd over TCP and nothing else.

The daemons have no part in a fault, so there is none here: their calls to the pagers are made directly.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
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
from vmferry_bench.figures import share_of
from vmferry_bench.native import BenchError, native, program
from vmferry_bench.shape import Alone

if TYPE_CHECKING:  # a name of the stubs' types only
    from vmferry.v1.pager_pb2_grpc import PagerAsyncStub

MEMORY_MIB = 64
TOUCHES = 1500
PAUSE_US = 500
MANY = (1, 4, 16)
MANY_TOUCHES = 400
MANY_PAUSE_US = 4000
"""So few faults that 16 VMs do not fill two cores."""
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
_LAYOUT = common_pb2.MemoryLayout(
    regions=[
        common_pb2.MemoryRegion(gpa=0, size=MEMORY_MIB * MIB, page_size=PAGE_4K, backing=common_pb2.BACKING_ANONYMOUS)
    ]
)


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
    async def start(cls, *arguments: str) -> SmallVmm:
        pipe = asyncio.subprocess.PIPE
        inner = await asyncio.create_subprocess_exec(
            program(),
            *arguments,
            "--vm",
            "bench",
            "--memory-mib",
            str(MEMORY_MIB),
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
    """A source's pager whose VMM stands still, and a destination's whose VMM touches."""

    source: PagerAsyncStub
    vmm: SmallVmm


@asynccontextmanager
async def pagers() -> AsyncIterator[Pair]:
    """Connected, without push."""
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-bench-")))
        for name in "sd":
            (root / name).mkdir()  # two directories in /tmp
        source = await _pager(stack, root / "s", "source")
        first, last = loopback_places(1)[0].page_ports
        serving = await source.ServeSource(
            pager_pb2.ServeSourceRequest(
                layout=_LAYOUT, listen_ip="127.0.0.1", port_first=first, port_last=last, token=TOKEN
            )
        )
        holder = await SmallVmm.start("hold", str(root / "s" / "memory.sock"))
        stack.push_async_callback(holder.end)
        await source.Freeze(pager_pb2.FreezeRequest())
        destination = await _pager(stack, root / "d", "destination")
        expected = await destination.ExpectDestination(pager_pb2.ExpectDestinationRequest(layout=_LAYOUT))
        features = ",".join(expected.uffd_features)
        vmm = await SmallVmm.start("touch", str(root / "d" / "memory.sock"), "--features", features)
        stack.push_async_callback(vmm.end)
        await destination.ConnectLanes(
            pager_pb2.ConnectLanesRequest(lane_address=serving.lane_address, token=TOKEN, demand_timeout_s=PATIENCE_S)
        )
        yield Pair(source, vmm)


async def _pager(stack: AsyncExitStack, directory: Path, role: str) -> PagerAsyncStub:
    argv = [str(find_program("vmferry-pager")), "--runtime-dir", str(directory), "--vm", "bench", "--role", role]
    process = await Process.start(f"{role}'s pager", argv, directory / "log")
    stack.push_async_callback(process.kill)
    address = f"unix:{directory}/pager.sock"
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=_OPTIONS))
    control: PagerAsyncStub = PagerStub(channel)
    await control.GetStatus(pager_pb2.GetStatusRequest(), timeout=PATIENCE_S, wait_for_ready=True)
    return control


def _order(count: int) -> list[int]:
    return random.Random(count).sample(range(MEMORY_MIB * MIB // PAGE_4K), count)  # need not be secret


async def _idle() -> list[float]:
    """First touches with nothing else on the link."""
    async with pagers() as pair:
        found = await pair.vmm.touch(_order(TOUCHES), PAUSE_US)
    _check(found, set())
    return found.us


async def _poison() -> tuple[list[float], list[float]]:
    """Touches of poisoned pages and, between them, of pages with data."""
    order = _order(TOUCHES)
    bad = set(order[::2])
    errors = [
        common_pb2.MemoryError(gpa=page * PAGE_4K, lsb=12, origin=common_pb2.ERROR_ORIGIN_OPERATOR, count=1)
        for page in bad
    ]
    async with pagers() as pair:
        await pair.source.MarkPoisoned(pager_pb2.MarkPoisonedRequest(errors=errors))
        found = await pair.vmm.touch(order, PAUSE_US)
    _check(found, bad)
    return found.us[::2], found.us[1::2]


def _check(found: Touches, bad: set[int]) -> None:
    """Raises:
    BenchError: a page is not what it must be: a fault of vmferry.
    """
    if found.wrong or set(found.poison) != bad:
        raise BenchError(
            f"vmferry: {len(found.wrong)} pages with wrong content, {len(found.poison)} poisoned instead of {len(bad)}"
        )


async def _floor() -> list[float]:
    found = Touches(**await native("floor", "--touches", str(TOUCHES), "--pause-us", str(PAUSE_US)))
    if found.wrong or found.poison:
        raise BenchError("the floor is wrong")
    return found.us


async def _many(count: int) -> list[float]:
    """Faults a second of each of `count` VMs that touch at the same time."""
    async with AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(pagers()) for _ in range(count)]
        order = _order(MANY_TOUCHES)

        async def rate(pair: Pair) -> float:
            begun = time.monotonic()
            _check(await pair.vmm.touch(order, MANY_PAUSE_US), set())
            return MANY_TOUCHES / (time.monotonic() - begun)

        return list(await asyncio.gather(*map(rate, pairs)))


async def measure_alone(rounds: int, many: bool) -> Alone:
    """Floor and ours in turn; `many` also asks 1, 4 and 16 VMs.

    Raises:
        BenchError: a page was not what it must be, or a part did not come up.
    """
    floor: list[float] = []
    idle: list[float] = []
    poison: list[float] = []
    data: list[float] = []
    for _ in range(rounds):
        floor += await _floor()
        idle += await _idle()
        bad, good = await _poison()
        poison += bad
        data += good
    rates = {count: await _many(count) for count in MANY} if many else {}
    return Alone(
        floor_us=_quantiles(floor),
        idle_us=_quantiles(idle),
        poison_us=_quantiles(poison),
        data_us=_quantiles(data),
        rates={str(count): sorted(each) for count, each in rates.items()},
    )


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {
        "count": float(len(values)),
        "p50": share_of(values, 0.5),
        "p90": share_of(values, 0.9),
        "p99": share_of(values, 0.99),
        "max": max(values),
    }
