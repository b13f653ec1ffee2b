"""A pager that answers on its control socket and moves no memory: started by the tests as the pager program.

`--vm` picks its behaviour: `web-1` works, `dies` ends at its start, `stubborn` does not end when told to, `full` has no
memory. It records its arguments and its calls in its runtime directory, a JSON array a line in `asked`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from vmferry.v1 import common_pb2, pager_pb2
from vmferry.v1.pager_pb2_grpc import PagerServicer, add_PagerServicer_to_server


class StandIn(PagerServicer):
    def __init__(self, vm: str, directory: Path) -> None:
        self.vm = vm
        self.ended = asyncio.Event()
        self._asked = directory / "asked"

    def note(self, *what: object) -> None:
        with self._asked.open("a") as asked:
            asked.write(json.dumps(what) + "\n")

    async def GetStatus(self, request: Any, context: Any) -> pager_pb2.PagerStatus:  # noqa: N802
        return pager_pb2.PagerStatus(
            vm=self.vm, pid=os.getpid(), link=pager_pb2.LINK_STATE_UP, progress=common_pb2.PageProgress(total=7)
        )

    async def ServeSource(self, request: Any, context: Any) -> pager_pb2.ServeSourceReply:  # noqa: N802
        self.note("ServeSource", request.push_bytes_per_s)
        return pager_pb2.ServeSourceReply(lane_address=f"{request.listen_ip}:{request.port_first}")

    async def ExpectDestination(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no UFFD_FEATURE_POISON")

    async def ListHeld(self, request: Any, context: Any) -> pager_pb2.ListHeldReply:  # noqa: N802
        """As many ranges as there may be, each as long in the message as it may get."""
        far = 1 << 52
        held = [common_pb2.PageRange(region=1, page=far + 2 * number, count=far) for number in range(65_536)]
        return pager_pb2.ListHeldReply(held=held)

    async def Preallocate(self, request: Any, context: Any) -> pager_pb2.PreallocateReply:  # noqa: N802
        if self.vm == "full":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "fallocate: No space left on device")
        self.note("Preallocate", len(request.held), context.time_remaining() > 3600)
        return pager_pb2.PreallocateReply(bytes=sum(one.count for one in request.held) * 4096 % (1 << 63))

    async def SetPushLimit(self, request: Any, context: Any) -> pager_pb2.SetPushLimitReply:  # noqa: N802
        self.note("SetPushLimit", request.push_bytes_per_s)
        return pager_pb2.SetPushLimitReply()

    async def StartPush(self, request: Any, context: Any) -> pager_pb2.StartPushReply:  # noqa: N802
        self.note("StartPush", request.lanes)
        return pager_pb2.StartPushReply()

    async def ConnectLanes(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.UNAVAILABLE, "connection refused")

    async def Complete(self, request: Any, context: Any) -> Any:  # noqa: N802
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "3 pages are absent")

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[pager_pb2.PagerEvent]:  # noqa: N802
        error = common_pb2.MemoryError(gpa=4096, origin=common_pb2.ERROR_ORIGIN_READ)
        events = [
            pager_pb2.PagerEvent(number=1, memory_attached=pager_pb2.MemoryAttachedEvent(vmm_pid=5)),
            pager_pb2.PagerEvent(number=2, link=pager_pb2.LinkEvent(state=pager_pb2.LINK_STATE_DOWN, reason="cut")),
            pager_pb2.PagerEvent(number=3, memory_error=pager_pb2.MemoryErrorEvent(error=error, hva=9, reported=True)),
            pager_pb2.PagerEvent(number=4, all_present=pager_pb2.AllPresentEvent()),
        ]
        for event in events[request.after :]:
            yield event

    async def Shutdown(self, request: Any, context: Any) -> pager_pb2.ShutdownReply:  # noqa: N802
        if self.vm != "stubborn":
            self.ended.set()
        return pager_pb2.ShutdownReply()


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--runtime-dir", "--vm", "--role"):
        parser.add_argument(name, required=True)
    for name in ("--page-path-cpus", "--lane-cpus", "--spin-us"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    if arguments.vm == "dies":
        sys.exit("no such luck")
    stand_in = StandIn(arguments.vm, Path(arguments.runtime_dir))
    stand_in.note("started", arguments.page_path_cpus, arguments.lane_cpus, arguments.spin_us)
    server = grpc.aio.server()
    add_PagerServicer_to_server(stand_in, server)
    server.add_insecure_port(f"unix:{Path(arguments.runtime_dir) / 'pager.sock'}")
    await server.start()
    await stand_in.ended.wait()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(main())
