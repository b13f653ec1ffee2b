"""Pagers are started, found again, driven and ended: with a stand-in for the program (`pager_stand_in.py`)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import pager_stand_in
from tests.support.late_listener import late_listener
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.allocation import HELD_MAX
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion, PageRange
from vmferry.model.pager import AllPresent, LinkChanged, MemoryAttached, MemoryErrorFound
from vmferry.pager import process
from vmferry.pager.client import GrpcPager
from vmferry.pager.directory import CONTROL_SOCKET
from vmferry.pager.process import PagerProcesses
from vmferry.pager.settings import LaneSettings, PagerSettings, PagerTuning
from vmferry.units import MIB, Gpa

LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), MIB, 4096, Backing.MEMFD),))


@pytest.fixture
def program(tmp_path: Path) -> str:
    script = tmp_path / "pager"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{pager_stand_in.__file__}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
async def pagers(
    request: pytest.FixtureRequest, tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[PagerProcesses]:
    """A parameter: other settings than the defaults."""
    source_root = str(Path(process.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", source_root)
    monkeypatch.setattr(process, "START_S", patient(60))  # the stand-in imports grpc, on a machine that may be busy
    made = PagerProcesses(tmp_path, program, getattr(request, "param", None))
    yield made
    for key in made.keys():  # noqa: SIM118 not a mapping
        await made.remove(key)
    await made.close()


def asked(tmp_path: Path, key: str) -> list[list[object]]:
    return [json.loads(line) for line in (tmp_path / "vms" / key / "asked").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_pager_outlives_its_daemon_and_is_found_and_removed(
    pagers: PagerProcesses, tmp_path: Path, program: str
) -> None:
    assert await pagers.find("m1-source") is None
    pager = await pagers.start("m1-source", "web-1", source=True)
    status = await pager.status()
    assert (status.link_up, status.progress.total) == (True, 7)
    assert os.getsid(status.pid) == status.pid
    assert pager.memory_socket == tmp_path / "vms" / "m1-source" / "memory.sock"
    assert await pagers.start("m1-source", "web-1", source=True) is pager

    restarted = PagerProcesses(tmp_path, program)
    found = await restarted.find("m1-source")
    assert found is not None
    assert (await found.status()).pid == status.pid
    await restarted.close()

    await pagers.remove("m1-source")
    assert not (tmp_path / "vms" / "m1-source").exists()
    assert await pagers.find("m1-source") is None
    await pagers.remove("m1-source")


async def test_a_pager_that_does_not_end_is_killed(pagers: PagerProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_S", 2.0)
    pid = (await (await pagers.start("m2", "stubborn", source=False)).status()).pid
    await pagers.remove("m2")
    async with asyncio.timeout(patient(20)):
        while alive(pid):  # until its exit status was taken too: no zombie  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_pager_that_ends_at_once_is_told_with_its_last_words(pagers: PagerProcesses) -> None:
    with pytest.raises(VmferryError, match="no such luck") as caught:
        await pagers.start("m3", "dies", source=True)
    assert caught.value.reason is Reason.PAGER_FAILED


async def test_a_cancelled_spawn_leaves_no_pager(pagers: PagerProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, children, begun = process._spawn, [], threading.Event()

    def slow(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
        begun.set()
        time.sleep(0.2)
        children.append(spawn(command, log_path))
        return children[0]

    monkeypatch.setattr(process, "_spawn", slow)
    starting = asyncio.create_task(pagers.start("m1-source", "web-1", source=True))
    assert await asyncio.to_thread(begun.wait, 60)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    (child,) = children
    assert child.returncode is not None
    await pagers.remove("m1-source")
    assert pagers.keys() == []


async def test_statuses_become_reasons(pagers: PagerProcesses) -> None:
    pager = await pagers.start("m4", "web-1", source=False)
    assert await pager.serve_source(LAYOUT, "t", 0) == "127.0.0.1:7700"
    with pytest.raises(VmferryError, match="UFFD_FEATURE_POISON") as lacks:
        await pager.expect_destination(LAYOUT)
    with pytest.raises(VmferryError, match=r"10\.0\.0\.9:7700") as link:
        await pager.connect_lanes("10.0.0.9:7700", "t")
    with pytest.raises(VmferryError, match="3 pages are absent") as absent:
        await pager.complete()
    await pager.shutdown(even_if_guest_dies=True)
    await pagers.remove("m4")
    with pytest.raises(VmferryError) as dead:
        await pager.status()
    reasons = [caught.value.reason for caught in (lacks, link, absent)]
    assert reasons == [Reason.KERNEL_LACKS_FEATURE, Reason.LINK_DOWN, Reason.PAGER_FAILED]
    assert dead.value.reason is Reason.PAGER_FAILED


async def test_events_come_in_order_from_where_the_caller_is(pagers: PagerProcesses) -> None:
    pager = await pagers.start("m5", "web-1", source=False)
    events = [event async for event in pager.events(0)]
    assert [event.number for event in events] == [1, 2, 3, 4]
    assert [type(event.body) for event in events] == [MemoryAttached, LinkChanged, MemoryErrorFound, AllPresent]
    assert [event.number async for event in pager.events(2)] == [3, 4]


@pytest.mark.parametrize(("key", "what"), [("../x", "key"), ("", "key"), ("a" * 128, "key")])
async def test_a_key_that_makes_no_directory_is_refused(pagers: PagerProcesses, key: str, what: str) -> None:
    with pytest.raises(VmferryError, match=what):
        await pagers.start(key, "web-1", source=True)


def test_a_program_that_is_nowhere_is_named() -> None:
    with pytest.raises(VmferryError, match="no-such-program is neither next to"):
        process.locate("no-such-program")


async def test_unconfigured_options_are_not_handed_on(pagers: PagerProcesses, tmp_path: Path) -> None:
    pager = await pagers.start("m6", "web-1", source=False)
    await pager.start_push()
    assert asked(tmp_path, "m6") == [["started", None, None, None], ["StartPush", 0]]


@pytest.mark.parametrize(
    "pagers",
    [
        PagerSettings(
            lanes=LaneSettings(push_lanes=6), tuning=PagerTuning(page_path_cpus="2-3,7", lane_cpus="4", spin_us=0)
        )
    ],
    ids=["placed"],
    indirect=True,
)
async def test_tuning_and_lanes_reach_the_pager(pagers: PagerProcesses, tmp_path: Path) -> None:
    pager = await pagers.start("m7", "web-1", source=False)
    await pager.start_push()
    assert asked(tmp_path, "m7") == [["started", "2-3,7", "4", "0"], ["StartPush", 6]]


async def test_a_push_limit_is_told_at_the_start_and_later(pagers: PagerProcesses, tmp_path: Path) -> None:
    pager = await pagers.start("m8", "web-1", source=True)
    await pager.serve_source(LAYOUT, "t", 5_000_000)
    for limit in (1 << 40, 0):
        await pager.set_push_limit(limit)
    assert asked(tmp_path, "m8")[1:] == [["ServeSource", 5_000_000], ["SetPushLimit", 1 << 40], ["SetPushLimit", 0]]


async def test_as_many_ranges_as_there_may_be_fit_and_have_time(pagers: PagerProcesses, tmp_path: Path) -> None:
    pager = await pagers.start("m9", "web-1", source=False)
    held = await pager.list_held(LAYOUT)
    assert len(held) == HELD_MAX
    assert held[1] == PageRange(1, (1 << 52) + 2, 1 << 52)
    assert await pager.preallocate([PageRange(0, 0, 1 << 30)]) == 1 << 42
    terabytes = [PageRange(0, 1 << 52, 1 << 14) for _ in range(HELD_MAX)]
    await pager.preallocate(terabytes)
    assert asked(tmp_path, "m9")[1:] == [["Preallocate", 1, True], ["Preallocate", HELD_MAX, True]]


async def test_a_shortage_of_memory_says_how_much_and_why(pagers: PagerProcesses) -> None:
    pager = await pagers.start("m10", "full", source=False)
    with pytest.raises(VmferryError, match="the 64 MiB that full holds: fallocate: No space left") as caught:
        await pager.preallocate([PageRange(0, 0, 16 * 1024)])
    assert caught.value.reason is Reason.DESTINATION_NO_MEMORY
    assert "another destination" in caught.value.remedy


async def test_a_pager_that_is_busy_is_waited_for(pagers: PagerProcesses, tmp_path: Path) -> None:
    """The first bytes of its connection come late."""
    await pagers.start("m11", "web-1", source=False)
    busy = tmp_path / "busy"
    busy.mkdir()
    real = tmp_path / "vms" / "m11" / CONTROL_SOCKET
    async with late_listener(
        lambda serve: asyncio.start_unix_server(serve, busy / CONTROL_SOCKET),
        lambda: asyncio.open_unix_connection(real),
        late_s=0.7,
    ):
        pager = GrpcPager(busy, "web-1", PagerSettings())
        assert (await pager.status()).progress.total == 7
        await pager.close()


def test_a_directory_whose_pager_removes_its_own_files_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "m1-source"
    directory.mkdir()
    for name in ("control.sock", "pager.log", "vm"):
        (directory / name).touch()
    unlink = os.unlink
    raced: list[str] = []

    def quicker_pager(name: str, **options: int) -> None:
        unlink(name, **options)
        if not raced:
            raced.append(name)
            raise FileNotFoundError(name)

    monkeypatch.setattr(os, "unlink", quicker_pager)
    process._clear(directory)
    assert raced
    assert not directory.exists()
