"""The stage of the scenario tests: real daemons and real guests on this machine, as in the demo.

Daemons are started once a module, since their start costs more than a migration of a small guest. Each test brings
guests with names of its own, and tells its processes apart by them.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vmferry.client.api import Api
from vmferry.client.follow import TERMINAL_PHASES, follow_migrations
from vmferry.client.refusal import ApiError
from vmferry.demo.admin import GuestReport, Mapped
from vmferry.demo.course import Cast, Course, Page, pages_to_lose
from vmferry.demo.network import loopback_places
from vmferry.demo.options import PAYLOAD_BYTES, GuestShape, WaitingShape
from vmferry.demo.patience import patient
from vmferry.demo.processes import processes_of
from vmferry.demo.stage import Guest, Host, Stage, until
from vmferry.units import MIB, PAGE_4K
from vmferry.v1 import machines_pb2
from vmferry.v1.migrations_pb2 import Migration

SMALL = 48 * MIB
"""16 MiB of it belong to the payload."""
SOON_S = patient(20.0)
"""For events that take well under a second on an idle machine."""
ENDED_S = patient(60.0)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two hosts and their APIs."""

    stage: Stage
    home: Host
    away: Host
    home_api: Api
    away_api: Api


def _unhurried(sections: dict[str, str]) -> dict[str, str]:
    return {**sections, "timeouts": f"downtime_s = 60.0\n{sections.get('timeouts', '')}".strip()}


@asynccontextmanager
async def two_hosts(home: dict[str, str] | None = None, away: dict[str, str] | None = None) -> AsyncIterator[Pair]:
    """Two daemons on loopback; further lines of configuration by section. A loaded machine exceeds no blackout."""
    first, second = loopback_places(2)
    home, away = _unhurried(home or {}), _unhurried(away or {})
    async with Stage() as stage:
        hosts = await asyncio.gather(stage.host("home", first, **home), stage.host("away", second, **away))
        yield Pair(stage, *hosts, await stage.api(hosts[0]), await stage.api(hosts[1]))


def shape(memory: int = SMALL, **more: object) -> GuestShape:
    """A small guest."""
    return GuestShape(memory=memory, **more)  # type: ignore[arg-type]


async def cast(pair: Pair, vm: str, accel: str, guest_shape: GuestShape, waiting: WaitingShape | None = None) -> Cast:
    """A guest that has been through all of its memory on the first host, and a VMM that waits on the second."""
    source, destination = await asyncio.gather(
        pair.stage.guest(vm, pair.home, accel, guest_shape), pair.stage.guest(vm, pair.away, accel, waiting)
    )
    await pair.stage.warm(source)
    return Cast(source, destination, pair.home_api, pair.away_api)


async def pages_of(course: Course) -> list[int]:
    """GPAs of the pages that may go bad."""
    return pages_to_lose((await course.cast.home.machine(course.cast.source.vm)).layout)


def told(pages: Sequence[int], tell: bool) -> list[Page]:
    return [(gpa, tell) for gpa in pages]


async def report(guest: Guest) -> GuestReport:
    return await guest.admin.report()


async def goes_on(guest: Guest, within_s: float = SOON_S) -> GuestReport:
    """Waits until the guest has touched more than it has now; the report that shows it."""
    before = await guest.admin.report()
    last = before

    async def more() -> bool:
        nonlocal last
        last = await guest.admin.report()
        return last.touches > before.touches

    await until(f"{guest.vm} to go on (touches stay at {before.touches})", more, within_s)
    return last


async def guest_at_home(pair: Pair, vm: str, *options: str) -> Guest:
    """A guest that runs, with options of the reference VMM for tests."""
    guest = await pair.stage.guest(vm, pair.home, "process", shape(), options)
    await goes_on(guest)
    return guest


async def ended(api: Api, migration_id: str, within_s: float = ENDED_S) -> Migration:
    """The migration in its terminal phase."""
    last = Migration()
    try:
        async with asyncio.timeout(within_s):
            async for update in follow_migrations(api, migration_id):
                last = update
    except TimeoutError:
        raise AssertionError(f"{migration_id} has not ended within {within_s:g} s:\n{last}") from None
    assert last.phase in TERMINAL_PHASES
    return last


async def reaches(api: Api, migration_id: str, phase: int, within_s: float = SOON_S) -> Migration:
    """The migration in the phase; fails at once if it ends in another."""
    async with asyncio.timeout(within_s):
        async for update in follow_migrations(api, migration_id):
            if update.phase == phase:
                return update
            assert update.phase not in TERMINAL_PHASES, update
    raise AssertionError("the stream ended")


async def nothing_is_left(pair: Pair, vm: str) -> None:
    """The destination keeps nothing of a migration that failed: no pager, no machine that migrates."""

    async def clean() -> bool:
        if pagers(pair.stage.root / pair.away.name, vm):
            return False
        try:
            machine = await pair.away_api.machine(vm)
        except ApiError as error:
            return error.reason == "VM_UNKNOWN"
        migrating = (machines_pb2.MACHINE_STATE_MIGRATING_IN, machines_pb2.MACHINE_STATE_MIGRATING_OUT)
        return machine.state not in migrating and not machine.migration_id

    await until(f"the destination to be rid of {vm}", clean, SOON_S)


async def unharmed(pair: Pair, guest: Guest) -> None:
    """The guest's counter continues in its place, and the destination has nothing of it."""
    assert (await goes_on(guest)).wrong_bytes == 0
    await nothing_is_left(pair, guest.vm)


def pagers(directory: Path, vm: str = "") -> list[int]:
    """Process ids of pagers whose runtime directory lies below `directory`, of one VM or of all."""
    found = []
    for pid in processes_of(directory):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "vmferry-pager" in words[0] and (not vm or f"--vm\0{vm}\0" in "\0".join(words)):
            found.append(pid)
    return found


async def read_memory(guest: Guest, first: int = PAYLOAD_BYTES) -> dict[int, bytes | None]:
    """Every page from GPA `first` on; None where it is poisoned.

    Read through /proc/PID/mem, which answers EIO for a poisoned page and takes no signal. A page that has not arrived
    would make the reader wait, so this runs in a thread.
    """
    regions = await guest.admin.regions()
    return await asyncio.to_thread(_read_pages, guest.process.pid, regions, first)


def _read_pages(pid: int, regions: Sequence[Mapped], first: int) -> dict[int, bytes | None]:
    pages: dict[int, bytes | None] = {}
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for region in regions:
            for gpa in range(max(region.gpa, first), region.gpa + region.size, PAGE_4K):
                pages[gpa] = _read_page(memory, region.hva + gpa - region.gpa)
    finally:
        os.close(memory)
    return pages


def _read_page(memory: int, hva: int) -> bytes | None:
    try:
        return os.pread(memory, PAGE_4K, hva)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EFAULT):
            raise
        return None


def differing(before: dict[int, bytes | None], after: dict[int, bytes | None], bad: frozenset[int]) -> list[str]:
    """Pages that are not as they were, but for those that are bad now."""
    assert before.keys() == after.keys()
    return [
        f"{gpa:#x}: {'poisoned' if after[gpa] is None else 'other bytes'}"
        for gpa in before
        if gpa not in bad and (after[gpa] != before[gpa] or after[gpa] is None)
    ]


def unique(words: str) -> str:
    """A VM's name from a test's id: short, since it becomes part of socket paths."""
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:20].rstrip("-")
    return f"{slug}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"
