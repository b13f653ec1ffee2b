"""A VM of 1 TiB on paper: the memory that pagers keep for it, and how long they take to begin. No page moves."""

from __future__ import annotations

import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from vmferry.demo.network import loopback_places
from vmferry.demo.processes import Process
from vmferry.v1 import pager_pb2
from vmferry_bench.native import native
from vmferry_bench.pair import TOKEN, layout, memory_error, pager

MEMORY_GIB = 1024
BACKING = "memfd"
ERRORS = 32_768
"""Far more than a host has memory errors: enough to see the bytes that one costs."""
ERRORS_A_CALL = 4096
PATIENCE_S = 120.0
TMPFS = Path("/dev/shm")
"""A tmpfs, as the runtime directory is on a host."""


async def measure_paper() -> dict[str, float]:
    """Bytes and seconds: of the page table by itself (keys as the native program has them), and of the two pagers."""
    with tempfile.TemporaryDirectory(prefix="vmferry-bench-", dir=_tmpfs()) as name:
        root = Path(name)
        for part in ("table", "s", "d"):
            (root / part).mkdir()
        found = await native("paper", str(root / "table"), "--memory-gib", str(MEMORY_GIB))
        numbers = {key: float(value) for key, value in found.items()}
        return numbers | await _source(root / "s") | await _destination(root / "d")


def _tmpfs() -> Path | None:
    return TMPFS if TMPFS.is_dir() else None


async def _source(directory: Path) -> dict[str, float]:
    first, last = loopback_places(1)[0].page_ports
    request = pager_pb2.ServeSourceRequest(
        layout=layout(BACKING, MEMORY_GIB << 10), listen_ip="127.0.0.1", port_first=first, port_last=last, token=TOKEN
    )
    async with AsyncExitStack() as stack:
        control, process = await pager(stack, directory, "source")
        before, begun = _anonymous(process), time.monotonic()
        await control.ServeSource(request, timeout=PATIENCE_S)
        taken, serving = time.monotonic() - begun, _anonymous(process)
        for page in range(0, ERRORS, ERRORS_A_CALL):
            # One in 64 pages, so that no run of them could be kept as one.
            errors = [memory_error(64 * n) for n in range(page, page + ERRORS_A_CALL)]
            await control.MarkPoisoned(pager_pb2.MarkPoisonedRequest(errors=errors), timeout=PATIENCE_S)
        with_errors = _anonymous(process)
    return {
        "source_s": taken,
        "source_bytes": serving - before,
        "error_bytes": (with_errors - serving) / ERRORS,
    }


async def _destination(directory: Path) -> dict[str, float]:
    request = pager_pb2.ExpectDestinationRequest(layout=layout(BACKING, MEMORY_GIB << 10))
    found: dict[str, float] = {}
    for times in ("anew", "again"):
        async with AsyncExitStack() as stack:
            control, process = await pager(stack, directory, "destination")
            before, begun = _anonymous(process), time.monotonic()
            await control.ExpectDestination(request, timeout=PATIENCE_S)
            found[f"destination_{times}_s"] = time.monotonic() - begun
            found[f"destination_{times}_bytes"] = _anonymous(process) - before
    return found


def _anonymous(process: Process) -> float:
    """Bytes of memory that a process has for itself: `RssAnon` (proc_pid_status(5))."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
