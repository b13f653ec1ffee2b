"""The cost of a long history and of many migrations under way, as ratios to an empty daemon.

`python -m vmferry_bench.history` fills a store with 3,000 ended migrations, lets 50 be under way, and asks page,
metrics and list over loopback. It prints one JSON object, with the longest hold of the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import structlog

from vmferry.api.server import ApiServer, Controls
from vmferry.client.api import open_api
from vmferry.daemon.host_state import HostState
from vmferry.daemon.program import SWITCH_S
from vmferry.migration.environment import Environment
from vmferry.migration.service import MigrationService
from vmferry.model.facts import Event
from vmferry.model.journal import JournalEntry
from vmferry.model.migration import Incoming, Job, Latency, Outcome, PageProgress, Phase, PhaseChange
from vmferry.ops.server import OpsServer
from vmferry.ops.state import Check, SecurityView
from vmferry.store.sqlite import SqliteStore, open_store
from vmferry.testing.pager import FakePager, FakePagers
from vmferry.testing.peer import FakePeers
from vmferry.testing.script import Script
from vmferry.testing.vmm import FakeVmm, FakeVmms, identity

ENDED, MOVING, ASKS = 3_000, 50, 7
PROGRESS = PageProgress(
    total=131_072,
    push=120_000,
    demand=11_072,
    bytes_received=1 << 29,
    faults=11_072,
    first_touch=Latency(11_072, 110.0, 300.0, 2400.0, 6000.0, (5,) * 40, 1e6),
)
BUDGETS = {"page_s": 0.150, "page_bytes": 60_000, "metrics_s": 0.050, "list_s": 0.5, "held_s": 0.005}
"""The limits on a machine of the present; elsewhere the ratios tell."""


class Fit:
    """A host whose conditions all hold."""

    async def checks(self) -> Sequence[Check]:
        return ()


class Held:
    """The longest time that the event loop was held: CPU time of its thread between two turns of a task that is always
    due. Time that the host gave to others does not count.
    """

    STEP_S = 0.001

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def run(self) -> None:
        while True:
            before_s = time.thread_time()
            await asyncio.sleep(self.STEP_S)
            self.longest_s = max(self.longest_s, time.thread_time() - before_s)


async def fill(store: SqliteStore, ended: int) -> None:
    """Writes ended jobs, with two events each."""
    now_us = time.time_ns() // 1000
    for number in range(ended):
        name, at_us = f"m{number:05}", now_us - (ended - number) * 1_000_000
        course = (PhaseChange(Phase.QUEUED, at_us), PhaseChange(Phase.COMPLETED, at_us + 900_000))
        job = Job(name, f"vm-{number % 500}", "host-b:7601", phase=Phase.COMPLETED, created_us=at_us, course=course)
        await store.save_job(replace(job, ended_us=at_us + 900_000, total_s=0.9, downtime_s=0.012, progress=PROGRESS))
        await store.add_events([(name, Event("host-a", at_us + part, at_us, "POSTCOPY")) for part in range(2)])


@asynccontextmanager
async def daemon(directory: Path, ended: int, moving: int) -> AsyncIterator[tuple[str, str]]:
    """API and ops endpoint over a store; gives their addresses."""
    store = await open_store(directory / "vmferry.db")
    await fill(store, ended)
    now_us = time.time_ns() // 1000
    script = Script("host-a")
    vmms, pagers = FakeVmms(), FakePagers(script)
    for number in range(moving):
        name, vm = f"in{number:03}", f"in-{number}"
        course = (PhaseChange(Phase.POSTCOPY, now_us),)
        await store.save_incoming(Incoming(name, vm, "host-b", Outcome.RUNNING, progress=PROGRESS, course=course))
        for kind, data in (("prepared", {"vmm_pid": number + 1, "vmm_life": ""}), ("running", {})):
            await store.append_journal(JournalEntry(name, kind, now_us, dict(data)))
        vmms.add(FakeVmm(identity(vm, "running", number + 1, "x86_64/process"), script))
        pager = pagers.running[f"{name}-destination"] = FakePager(f"{name}-destination", script, arrives=False)
        pager.state = replace(pager.state, link_up=True, progress=replace(PROGRESS, absent=9))
    peers = FakePeers(script, lambda _: None)
    environment = Environment(host="host-a", store=store, vmms=vmms, pagers=pagers, peers=peers)
    async with MigrationService(environment) as service:
        state = HostState("host-a", service, SecurityView)
        api = ApiServer(Controls(service, service.moves, service, None, state))  # type: ignore[arg-type]  # no QEMU here
        ops = OpsServer(state, Fit(), "bench")
        port, http = api.bind("127.0.0.1:0"), await ops.start("127.0.0.1", 0)
        await api.start()
        try:
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{http}"
        finally:
            await api.stop(0)
            await ops.stop()
    await store.close()


async def measured(ended: int, moving: int) -> dict[str, float]:
    """The medians of several asks, and the longest hold of the loop among them."""
    with tempfile.TemporaryDirectory() as directory:
        async with daemon(Path(directory), ended, moving) as (api, http), aiohttp.ClientSession() as session:
            held = Held()
            watch = asyncio.create_task(held.run())
            figures: dict[str, list[float]] = {"page_s": [], "page_bytes": [], "metrics_s": [], "list_s": []}
            for turn in range(ASKS + 1):
                if turn == 1:  # The first turn compiles templates and statements.
                    held.longest_s = 0.0
                    figures = {name: [] for name in figures}
                took_s, size = await asked(session, f"{http}/")
                figures["page_s"].append(took_s)
                figures["page_bytes"].append(size)
                figures["metrics_s"].append((await asked(session, f"{http}/metrics"))[0])
                figures["list_s"].append(await listed(api))
            watch.cancel()
            middle = {name: sorted(values)[len(values) // 2] for name, values in figures.items()}
            return middle | {"held_s": held.longest_s}


async def asked(session: aiohttp.ClientSession, url: str) -> tuple[float, int]:
    """Seconds and compressed bytes of one answer."""
    began_s = time.monotonic()
    async with session.get(url, auto_decompress=False, headers={"Accept-Encoding": "gzip"}) as answer:
        answer.raise_for_status()
        return time.monotonic() - began_s, len(await answer.read())


async def listed(address: str) -> float:
    """Seconds of the two lists of `vmferry list`."""
    began_s = time.monotonic()
    async with open_api(address, 60.0, {}) as api:
        for migrations in (api.list_migrations(), api.list_incoming()):
            shown = 0
            async for _ in migrations:
                shown += 1
                if shown > MOVING + 20:
                    break
            await migrations.aclose()
    return time.monotonic() - began_s


async def main() -> None:
    """Measures an empty daemon, then a full one."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.setswitchinterval(SWITCH_S)
    empty, full = await measured(0, 0), await measured(ENDED, MOVING)
    ratios = {name: full[name] / max(empty[name], 1e-9) for name in full}
    within = {name: full[name] <= limit for name, limit in BUDGETS.items()}
    json.dump({"empty": empty, "full": full, "ratio": ratios, "within_budget": within}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    asyncio.run(main())
