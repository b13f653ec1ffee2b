"""A guest that is reset after a move finds fresh memory in the place of the bad pages, as at home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.qemu import Hosts, Image, Qemu, bad_pages, make_image, memory_options
from tests.support.scenario.harness import ended, unique
from vmferry.demo.patience import patient
from vmferry.demo.stage import until
from vmferry.v1 import migrations_pb2 as mg
from vmferry.vmm.qemu.mark import parse_mark

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

CLEARED = ((0x7000, 8), (0x10_0000, 0x1000))
"""The firmware's counter of processors, and the head of the guest's report: GPA and size."""
TABLES_GPA, TABLES_END = 0x10_1000, 0x100_0000


def that_can_boot_again(image: Image, directory: Path) -> Image:
    """The guest takes zeros in its tables for granted: QEMU must load them at each reset."""
    os.truncate(directory / f"at-{TABLES_GPA:x}.bin", TABLES_END - TABLES_GPA)
    options = list(image.options)
    for gpa, size in CLEARED:
        zeros = directory / f"zeros-{gpa:x}.bin"
        zeros.write_bytes(bytes(size))
        options += ["-device", f"loader,file={zeros},addr={gpa:#x},force-raw=on"]
    return Image(tuple(options), image.dump_bytes)


@pytest.mark.parametrize(
    ("version", "kind"), [("7.2", "memfd"), ("10.0", "memfd"), ("10.0", "anonymous")], ids=lambda word: word
)
async def test_a_reset_gives_the_guest_fresh_memory(
    request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path, version: str, kind: str
) -> None:
    """QEMU 7.2 maps new memory over a bad page; 10.0 drops the page, and its next touch faults."""
    qemu: Qemu = request.getfixturevalue({"7.2": "qemu72", "10.0": "qemu10"}[version])
    pair, vm = hosts.pair, unique(f"qemu reset {version} {kind}")
    image = that_can_boot_again(await make_image(tmp_path, 96, 1, "random"), tmp_path)
    memory = memory_options(kind, "pc-i440fx-7.2", tmp_path, vm)
    source = await hosts.start(pair.home, qemu, vm, memory, image)
    await source.warm(image)
    destination = await hosts.start(pair.away, qemu, vm, memory, image, "-S", "-incoming", "defer")
    bad = set(bad_pages(5))
    for gpa in bad:
        await pair.home_api.report_error(vm, gpa)
    await pair.home_api.create(vm, vm, str(pair.away.place.peer))
    last = await ended(pair.home_api, vm, patient(120.0))
    assert last.phase == mg.PHASE_COMPLETED, f"{last.reason}\n{destination.process.last_words()}"

    async def all_touched() -> bool:
        return {check["gpa"] for check in (await destination.report(image))["machine_checks"]} >= bad

    async def forgotten() -> bool:
        return not [error async for error in pair.away_api.memory_errors(vm)]

    async def unguarded() -> bool:
        texts = [fd.get("opaque", "") for one in await destination.ask("query-fdsets") for fd in one["fds"]]
        return not any(map(parse_mark, texts))

    await until("the guest to touch every bad page", all_touched, patient(60.0))
    assert not await forgotten()
    await destination.ask("system_reset")
    await until("the daemon to forget the pages", forgotten, patient(60.0))
    await destination.warm(image)
    report = await destination.goes_on(image)
    assert not report["machine_checks"] and not report["wrong_bytes"] and not report["fatal"], report
    await until("the guard to end", unguarded, patient(60.0))
    assert await destination.status() == "running"
