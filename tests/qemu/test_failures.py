"""A move that cannot be done leaves the guest running on its source; a daemon that dies takes no guest with it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.support.qemu import CPU, Hosts, Image, Qemu, Vm, make_image, memory_options
from tests.support.scenario.harness import ended, reaches, unique
from vmferry.client.refusal import ApiError, RefusedError
from vmferry.demo.patience import patient
from vmferry.v1 import migrations_pb2 as mg

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

MACHINE = "pc-i440fx-7.2"
WAITS = ("-S", "-incoming", "defer")
SLOW_PUSH = 2 << 20
"""Bytes a second: the guest's memory takes half a minute."""


@pytest.fixture
async def image(tmp_path: Path) -> Image:
    return await make_image(tmp_path, 96, 1, "random")


async def pair_of(hosts: Hosts, qemu: Qemu, vm: str, image: Image, tmp_path: Path, *differs: str) -> tuple[Vm, Vm]:
    """A guest that runs, and a QEMU that waits for it with further options."""
    memory = memory_options("memfd", MACHINE, tmp_path, vm)
    source = await hosts.start(hosts.pair.home, qemu, vm, memory, image)
    await source.warm(image)
    return source, await hosts.start(hosts.pair.away, qemu, vm, memory, image, *WAITS, *differs)


async def refusal_of_move(hosts: Hosts, vm: str) -> mg.Migration:
    """Moves the VM in vain; how it ended."""
    await hosts.pair.home_api.create(vm, vm, str(hosts.pair.away.place.peer))
    last = await ended(hosts.pair.home_api, vm, patient(120.0))
    assert last.phase in (mg.PHASE_FAILED, mg.PHASE_CANCELLED), last
    return last


async def is_well(vm: Vm, image: Image) -> None:
    assert await vm.status() == "running"
    report = await vm.goes_on(image)
    assert report["wrong_bytes"] == 0 and not report["fatal"]


async def test_a_state_that_the_destination_cannot_load(
    hosts: Hosts, qemu72: Qemu, image: Image, tmp_path: Path
) -> None:
    """It has no such device; QEMU ends with the failed load."""
    vm = unique("qemu failed load")
    memory = memory_options("memfd", MACHINE, tmp_path, vm)
    source = await hosts.start(hosts.pair.home, qemu72, vm, memory, image, "-device", "virtio-rng-pci")
    await source.warm(image)
    waiting = await hosts.start(hosts.pair.away, qemu72, vm, memory, image, *WAITS)
    await refusal_of_move(hosts, vm)
    await is_well(source, image)
    assert await waiting.process.ended(patient(20.0))


async def test_another_layout_is_refused_before_the_guest_is_stopped(
    hosts: Hosts, qemu72: Qemu, image: Image, tmp_path: Path
) -> None:
    vm = unique("qemu layout")
    source = await hosts.start(hosts.pair.home, qemu72, vm, memory_options("memfd", MACHINE, tmp_path, vm), image)
    await source.warm(image)
    other = memory_options("memfd", MACHINE, tmp_path, vm, 128)
    waiting = await hosts.start(hosts.pair.away, qemu72, vm, other, image, *WAITS)
    last = await refusal_of_move(hosts, vm)
    assert "0x8000000" in last.reason and "0x6000000" in last.reason, last.reason
    assert not last.downtime_s
    await is_well(source, image)
    assert await waiting.status() == "inmigrate"


async def test_another_machine_type_is_refused(
    hosts: Hosts, qemu72: Qemu, qemu10: Qemu, image: Image, tmp_path: Path
) -> None:
    """`pc` stands for another type in each version."""
    vm = unique("qemu alias")
    memory = memory_options("memfd", "pc", tmp_path, vm)
    source = await hosts.start(hosts.pair.home, qemu72, vm, memory, image)
    await hosts.start(hosts.pair.away, qemu10, vm, memory, image, *WAITS)
    last = await refusal_of_move(hosts, vm)
    assert "pc-i440fx-7.2" in last.reason and "pc-i440fx-10.0" in last.reason, last.reason
    await is_well(source, image)


async def test_a_vm_that_qemu_itself_would_not_migrate(
    hosts: Hosts, qemu72: Qemu, image: Image, tmp_path: Path
) -> None:
    vm = unique("qemu blocked")
    memory = memory_options("memfd", MACHINE, tmp_path, vm)
    source = await hosts.start(hosts.pair.home, qemu72, vm, memory, image, "-cpu", f"{CPU},invtsc=on")
    await hosts.start(hosts.pair.away, qemu72, vm, memory, image, *WAITS)
    last = await refusal_of_move(hosts, vm)
    assert "invtsc" in last.reason, last.reason
    await is_well(source, image)


async def test_a_vm_that_its_operator_paused_is_left_alone(
    hosts: Hosts, qemu72: Qemu, image: Image, tmp_path: Path
) -> None:
    vm = unique("qemu paused")
    source, waiting = await pair_of(hosts, qemu72, vm, image, tmp_path)
    await source.ask("stop")
    with pytest.raises(ApiError):
        await hosts.pair.home_api.create(vm, vm, str(hosts.pair.away.place.peer))
        raise ApiError("FAILED", (await ended(hosts.pair.home_api, vm, patient(60.0))).reason, "")
    assert await source.status() == "paused"
    assert await waiting.status() == "inmigrate"
    await source.ask("cont")
    await is_well(source, image)


async def test_both_daemons_die_while_pages_are_missing(
    hosts: Hosts, qemu72: Qemu, image: Image, tmp_path: Path
) -> None:
    vm = unique("qemu daemons die")
    pair = hosts.pair
    _, destination = await pair_of(hosts, qemu72, vm, image, tmp_path)
    await pair.home_api.create(vm, vm, str(pair.away.place.peer), SLOW_PUSH)
    await reaches(pair.home_api, vm, mg.PHASE_POSTCOPY, patient(60.0))
    for host in (pair.away, pair.home):
        await host.kill()
    await destination.goes_on(image)
    for host in (pair.away, pair.home):
        await host.start()
    with contextlib.suppress(RefusedError):  # The guest may have asked for the last page already.
        await pair.home_api.set_push_limit(vm, 0)
    last = await ended(pair.home_api, vm, patient(120.0))
    assert last.phase == mg.PHASE_COMPLETED, last.reason
    await is_well(destination, image)
