"""Unmodified QEMUs move between two daemons: no wrong byte, and one machine check for each poisoned page touched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.qemu import Hosts, Image, Qemu, Vm, bad_pages, make_image, memory_options
from tests.support.scenario.harness import ended, unique
from vmferry.demo.patience import patient
from vmferry.v1 import migrations_pb2 as mg

pytestmark = pytest.mark.asyncio(loop_scope="module")

OLD = "pc-i440fx-7.2"
WAITS = ("-S", "-incoming", "defer")
MOVES = [
    # source, destination, machine type, memory of the source, memory of the destination
    ("7.2", "7.2", OLD, "memfd", "memfd"),
    ("7.2", "7.2", OLD, "memfd", "memfd-prealloc"),
    ("7.2", "7.2", OLD, "tmpfs", "anonymous"),
    ("7.2", "10.0", OLD, "memfd", "memfd"),
    ("10.0", "10.0", "pc-i440fx-10.0", "memfd", "memfd"),
    ("10.0", "10.0", "pc-i440fx-10.0", "default", "default"),
    ("10.0", "10.0", "pc-i440fx-10.0", "anonymous", "anonymous-prealloc"),
    ("10.0", "10.0", "pc-q35-10.0", "tmpfs", "memfd"),
]


def program(request: pytest.FixtureRequest, version: str) -> Qemu:
    found: Qemu = request.getfixturevalue({"7.2": "qemu72", "10.0": "qemu10"}[version])
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("move", MOVES, ids="-".join)
async def test_a_poisoned_guest_moves(
    request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path, move: tuple[str, ...]
) -> None:
    here, there, machine, memory, waiting = move
    vm = unique("-".join(("qemu", *move)))
    image = await make_image(tmp_path, 96, 1, "random")
    pair = hosts.pair
    source = await hosts.start(
        pair.home, program(request, here), vm, memory_options(memory, machine, tmp_path, f"{vm}-a"), image
    )
    before = await source.warm(image)
    destination = await hosts.start(
        *(pair.away, program(request, there), vm, memory_options(waiting, machine, tmp_path, f"{vm}-b"), image, *WAITS)
    )
    bad = bad_pages(5)
    for gpa in bad:
        await pair.home_api.report_error(vm, gpa)
    await pair.home_api.create(vm, vm, str(pair.away.place.peer))
    last = await ended(pair.home_api, vm, patient(120.0))
    assert last.phase == mg.PHASE_COMPLETED, f"{last.reason}\n{destination.process.last_words()}"
    after = await until_touched(destination, image, set(bad))
    assert after["wrong_bytes"] == 0 and not after["fatal"], after
    assert after["touches"] > before["touches"]
    checks = [check for check in after["machine_checks"] if check["severity"] == "AR"]
    assert Counter(check["gpa"] for check in checks) == Counter(bad)
    assert await destination.status() == "running"
    assert await source.process.ended(patient(30.0)), "the QEMU of a source ends once its pages are let go"
    assert {error.gpa async for error in pair.away_api.memory_errors(vm)} == set(bad)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_poison_stays_with_a_guest_that_moves_twice(
    request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path, version: str
) -> None:
    """QEMU's own migration refuses, or ends, a VM whose guest took a machine check."""
    qemu, pair, vm = program(request, version), hosts.pair, unique(f"qemu {version} twice")
    image = await make_image(tmp_path, 96, 1, "random")
    memory = memory_options("memfd", OLD, tmp_path, vm)
    first = await hosts.start(pair.home, qemu, vm, memory, image)
    await first.warm(image)
    second = await hosts.start(pair.away, qemu, vm, memory, image, *WAITS)
    bad = bad_pages(5)
    for gpa in bad:
        await pair.home_api.report_error(vm, gpa)
    await pair.home_api.create(f"{vm}-1", vm, str(pair.away.place.peer))
    assert (await ended(pair.home_api, f"{vm}-1", patient(120.0))).phase == mg.PHASE_COMPLETED
    await until_touched(second, image, set(bad))
    assert await first.process.ended(patient(20.0))
    third = await hosts.start(pair.home, qemu, vm, memory, image, *WAITS)
    await pair.away_api.create(f"{vm}-2", vm, str(pair.home.place.peer))
    last = await ended(pair.away_api, f"{vm}-2", patient(120.0))
    assert last.phase == mg.PHASE_COMPLETED, f"{last.reason}\n{third.process.last_words()}"
    assert last.progress.poison == len(bad)
    after = await third.goes_on(image)
    assert after["wrong_bytes"] == 0 and not after["fatal"], after
    assert {error.gpa async for error in pair.home_api.memory_errors(vm)} == set(bad)


async def until_touched(vm: Vm, image: Image, bad: set[int]) -> dict[str, object]:
    """The guest has stumbled over every bad page."""
    while True:
        report = await vm.goes_on(image)
        if {check["gpa"] for check in report["machine_checks"]} >= bad:
            return report
