"""The QEMUs of a host: their monitors appear, vanish, and share names with other VMMs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.scripted.qemu import ScriptedReach, scripted
from vmferry.demo.patience import patient
from vmferry.demo.stage import until
from vmferry.errors import Reason, VmferryError
from vmferry.testing.script import Script
from vmferry.testing.vmm import FakeVmm, FakeVmms, identity
from vmferry.vmm.qemu import monitors as module
from vmferry.vmm.qemu.monitors import QemuMonitors
from vmferry.vmm.session import VmmDeadlines

PATIENCE_S = patient(20.0)


@dataclass
class Watch:
    """The watch of one directory."""

    directory: Path
    qemus: QemuMonitors
    others: FakeVmms
    resets: list[str] = field(default_factory=list)

    def names(self) -> dict[str, str]:
        return {one.identity.vm: one.identity.state for one in self.qemus.all()}

    async def until_names(self, names: dict[str, str]) -> None:
        async def so() -> bool:
            return self.names() == names

        await until(f"{names}, not {self.names()}", so, PATIENCE_S)


@asynccontextmanager
async def watching(directory: Path, patterns: Sequence[str]) -> AsyncIterator[Watch]:
    resets: list[str] = []

    async def tell(vm: str) -> None:
        resets.append(vm)
        if len(resets) == 1:
            raise VmferryError(Reason.PAGER_FAILED, "no answer.")

    others = FakeVmms()
    remembered = directory / "qemus.json"
    made = QemuMonitors(patterns, remembered, ScriptedReach(), VmmDeadlines(), others=others, tell_reset=tell)
    task = asyncio.create_task(made.run())
    try:
        yield Watch(directory, made, others, resets)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    async with watching(tmp_path, [str(tmp_path / "*.qmp")]) as made:
        yield made


async def test_monitors_appear_and_vanish(watch: Watch) -> None:
    with scripted(watch.directory / "one.qmp", name="one"):
        await watch.until_names({"one": "running"})
        with scripted(watch.directory / "two.qmp", name="two", status="inmigrate"):
            await watch.until_names({"one": "running", "two": "incoming"})
        await watch.until_names({"one": "running"})
    await watch.until_names({})


async def test_a_monitor_that_breaks_is_adopted_again(watch: Watch) -> None:
    with scripted(watch.directory / "one.qmp", name="one") as qemu:
        await watch.until_names({"one": "running"})
        (before,) = watch.qemus.all()
        qemu.cut()
        await asyncio.wait_for(before.gone(), PATIENCE_S)

        async def again() -> bool:
            return [one is not before for one in watch.qemus.all()] == [True]

        await until("the next connection", again, PATIENCE_S)
        assert qemu.status == "running"


async def test_of_two_vms_of_one_name_the_second_is_refused(watch: Watch) -> None:
    with scripted(watch.directory / "hidden", name="web"):
        with scripted(watch.directory / "one.qmp", name="web"):
            await watch.until_names({"web": "running"})
            with pytest.raises(VmferryError, match="Another VMM of web is running") as caught:
                await watch.qemus.adopt(watch.directory / "hidden", "")
            assert caught.value.reason is Reason.VMM_REFUSED
        await watch.until_names({})
        await watch.qemus.adopt(watch.directory / "hidden", "")
        assert watch.names() == {"web": "running"}


async def test_a_name_that_a_vmm_of_the_protocol_has(watch: Watch) -> None:
    watch.others.add(FakeVmm(identity("web"), Script()))
    with scripted(watch.directory / "a.qmp", name="web", status="inmigrate"):
        await watch.until_names({"web": "incoming"})
    with scripted(watch.directory / "hidden", name="web"):
        with pytest.raises(VmferryError, match="Another VMM of web is running"):
            await watch.qemus.adopt(watch.directory / "hidden", "")
        adopted = await watch.qemus.adopt(watch.directory / "hidden", "web-2")
        assert adopted.identity.vm == "web-2"


async def test_a_qemu_that_was_adopted_by_request_is_remembered(tmp_path: Path) -> None:
    with scripted(tmp_path / "hidden", name="one"):
        async with watching(tmp_path, []) as first:
            await first.qemus.adopt(tmp_path / "hidden", "renamed")
        async with watching(tmp_path, []) as second:
            await second.until_names({"renamed": "running"})


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 64])
async def test_a_qemu_without_a_good_name_is_refused(watch: Watch, name: str) -> None:
    with scripted(watch.directory / "hidden", name=name):
        with pytest.raises(VmferryError, match="no name of a VM") as caught:
            await watch.qemus.adopt(watch.directory / "hidden", "")
        assert caught.value.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("fault", ["lie", "huge", "close", "refuse"])
@pytest.mark.parametrize("command", ["query-name", "query-cpus-fast", "query-status", "query-kvm", "query-memdev"])
async def test_a_monitor_that_lies_once_is_adopted_later(watch: Watch, command: str, fault: str) -> None:
    with scripted(watch.directory / "one.qmp", name="one", faults={command: fault}):
        await watch.until_names({"one": "running"})


async def test_a_qemu_that_is_neither_running_nor_waiting_is_left_alone(watch: Watch) -> None:
    with scripted(watch.directory / "hidden", name="one", status="paused") as qemu:
        with pytest.raises(VmferryError) as caught:
            await watch.qemus.adopt(watch.directory / "hidden", "")
        assert caught.value.reason is Reason.VM_NOT_RUNNING
        qemu.status = "running"
        await watch.qemus.adopt(watch.directory / "hidden", "")


async def test_each_reset_of_a_guest_is_told_also_after_one_that_failed(watch: Watch) -> None:
    with scripted(watch.directory / "one.qmp", name="one") as qemu:
        await watch.until_names({"one": "running"})

        async def told() -> bool:
            qemu.say("RESET")
            return len(watch.resets) > 1

        await until("two resets to be told", told, PATIENCE_S)
        assert set(watch.resets) == {"one"}
