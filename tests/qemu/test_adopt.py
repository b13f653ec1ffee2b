"""QEMUs are adopted by request, checked, and found again by the next daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.qemu import Hosts, Qemu, make_image, memory_options
from tests.support.scenario.harness import unique
from vmferry.client.refusal import ApiError
from vmferry.v1 import machines_pb2
from vmferry.v1.qemus_pb2 import QEMU_FINDING_WEIGHT_REFUSED
from vmferry.vmm.qemu.command import destination_command

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


async def test_a_qemu_is_adopted_by_request_and_again_by_the_next_daemon(
    hosts: Hosts, qemu72: Qemu, tmp_path: Path
) -> None:
    pair, vm = hosts.pair, unique("qemu by request")
    image = await make_image(tmp_path, 96, 1, "random")
    memory = memory_options("memfd", "pc-i440fx-7.2", tmp_path, vm)
    source = await hosts.start(pair.home, qemu72, vm, memory, image, kind="hidden")
    with pytest.raises(ApiError):
        await pair.home_api.check_qemu(vm)
    adopted = await pair.home_api.adopt_qemu(str(source.adopted), f"{vm}-2")
    assert (adopted.vm, adopted.vmm_pid, adopted.state) == (f"{vm}-2", source.process.pid, "running")
    await pair.home.kill()
    await pair.home.start()
    await hosts.knows(pair.home, f"{vm}-2", machines_pb2.MACHINE_STATE_RUNNING)
    assert await source.status() == "running"


async def test_a_monitor_that_is_none_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    with pytest.raises(ApiError) as caught:
        await hosts.pair.home_api.adopt_qemu(str(tmp_path / "nothing"), "")
    assert caught.value.reason == "VMM_GONE"


async def test_a_check_finds_no_fault_of_a_plain_vm_and_names_differences(
    hosts: Hosts, qemu72: Qemu, tmp_path: Path
) -> None:
    pair, vm = hosts.pair, unique("qemu check")
    image = await make_image(tmp_path, 96, 1, "random")
    memory = memory_options("memfd", "pc", tmp_path, vm)
    await hosts.start(pair.home, qemu72, vm, memory, image)
    alone = await pair.home_api.check_qemu(vm)
    assert not alone.findings
    assert alone.profile.machine_type == "pc-i440fx-7.2"
    assert destination_command(alone.command, alone.profile.machine_type)[-3:] == ["-S", "-incoming", "defer"]
    other = memory_options("memfd", "pc-q35-7.2", tmp_path, vm, 128)
    await hosts.start(pair.away, qemu72, vm, other, image, "-S", "-incoming", "defer")
    waiting = await pair.away_api.check_qemu(vm)
    found = (await pair.home_api.check_qemu(vm, waiting.profile)).findings
    facts = " ".join(one.fact for one in found if one.weight == QEMU_FINDING_WEIGHT_REFUSED)
    assert "pc-q35-7.2" in facts and "0x8000000" in facts


async def test_memory_that_an_old_qemu_cannot_save_is_found(hosts: Hosts, qemu72: Qemu, tmp_path: Path) -> None:
    pair, vm = hosts.pair, unique("qemu private")
    image = await make_image(tmp_path, 96, 1, "random")
    await hosts.start(pair.home, qemu72, vm, memory_options("default", "pc", tmp_path, vm), image)
    (found,) = (await pair.home_api.check_qemu(vm)).findings
    assert found.weight == QEMU_FINDING_WEIGHT_REFUSED
    assert "memory-backend-memfd" in found.remedy
