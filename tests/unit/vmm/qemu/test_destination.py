"""The destination side of a QEMU that follows a script."""

from __future__ import annotations

import pytest

from tests.support.scripted.qemu import LAYOUT, UFFD, commands_of
from tests.unit.vmm.qemu.conftest import SOON_S, WITHIN_S, Adopt, Rig
from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryLayout, MemoryRegion
from vmferry.units import Gpa
from vmferry.v1 import reach_pb2 as pb

STATE = b"a device state"
FEATURES = ["UFFD_FEATURE_POISON"]


async def prepared(adopt: Adopt, **differs: object) -> Rig:
    rig = await adopt(status="inmigrate", **differs)
    assert rig.vmm.identity.state == "incoming"
    await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)
    return rig


async def test_a_destination_from_incoming_to_complete(adopt: Adopt) -> None:
    rig = await prepared(adopt)
    assert rig.reach.calls == ["empty", "create_userfaultfd"], "memory is empty before it is registered"
    (message,) = rig.pager.messages
    assert (message["role"], message["process"], message["uffd"]) == ("destination", 1, 2)
    assert rig.qemu.marks == [f"vmferry:prepared:uffd={UFFD}"]
    await rig.vmm.load_state(STATE)
    assert rig.qemu.loaded == STATE
    assert commands_of(rig.qemu.transcript) == ["migrate-set-capabilities", "migrate-incoming"], "`cont` comes later"
    await rig.vmm.start()
    assert (rig.qemu.status, rig.vmm.identity.state) == ("running", "running")
    await rig.vmm.migration_complete(keep_uffd=True)
    assert rig.qemu.marks == [f"vmferry:running:uffd={UFFD}"], "poison is guarded"
    await rig.vmm.migration_complete(keep_uffd=False)
    assert not rig.qemu.marks and rig.reach.calls[-1] == "close_userfaultfd"


async def test_a_destination_without_a_state_is_given_back_as_it_was(adopt: Adopt) -> None:
    rig = await prepared(adopt)
    await rig.vmm.reset()
    assert rig.reach.calls[-1] == "close_userfaultfd"
    assert (rig.qemu.status, rig.qemu.marks, rig.vmm.identity.state) == ("inmigrate", [], "incoming")
    await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)


async def test_a_destination_with_a_state_is_ended(adopt: Adopt) -> None:
    """It would take no other."""
    rig = await prepared(adopt)
    await rig.vmm.load_state(STATE)
    await rig.vmm.reset()
    assert rig.qemu.transcript[-1] == "quit"


async def test_a_destination_that_does_not_answer_is_killed(adopt: Adopt) -> None:
    rig = await prepared(adopt)
    await rig.vmm.load_state(STATE)
    rig.qemu.faults["quit"] = "silent"
    rig.wait_within(SOON_S)
    await rig.vmm.reset()
    assert rig.qemu.process.wait() == -9


async def test_a_failed_load_leaves_only_the_way_to_the_end(adopt: Adopt) -> None:
    rig = await prepared(adopt, loads="failed")
    with pytest.raises(VmferryError, match="failed with its state") as caught:
        await rig.vmm.load_state(STATE)
    assert caught.value.reason is Reason.VMM_REFUSED
    with pytest.raises(VmferryError):
        await rig.vmm.start()
    assert "cont" not in rig.qemu.transcript
    await rig.vmm.reset()
    assert rig.qemu.transcript[-1] == "quit"


async def test_a_destination_that_ran_by_itself_is_refused(adopt: Adopt) -> None:
    """Started without -S, by somebody's `cont`: two copies would run."""
    rig = await prepared(adopt, status_after_load="running")
    with pytest.raises(VmferryError, match="'running' with the state loaded") as caught:
        await rig.vmm.load_state(STATE)
    assert caught.value.reason is Reason.VMM_REFUSED
    await rig.vmm.reset()
    assert rig.qemu.transcript[-1] == "quit"


@pytest.mark.parametrize("status", ["inmigrate", "shutdown", "internal-error", "postmigrate"])
async def test_no_vcpu_starts_in_a_state_that_is_not_paused(adopt: Adopt, status: str) -> None:
    rig = await prepared(adopt)
    await rig.vmm.load_state(STATE)
    rig.qemu.status = status
    with pytest.raises(VmferryError, match="not paused"):
        await rig.vmm.start()
    assert "cont" not in rig.qemu.transcript


async def test_a_start_whose_answer_was_lost_is_safe_to_repeat(adopt: Adopt) -> None:
    rig = await prepared(adopt)
    await rig.vmm.load_state(STATE)
    rig.qemu.faults["cont"] = "silent"
    rig.wait_within(SOON_S)
    with pytest.raises(VmferryError) as caught:
        await rig.vmm.start()
    rig.wait_within(WITHIN_S)
    assert caught.value.reason is Reason.VMM_TIMEOUT
    rig.qemu.status = "running"
    await rig.vmm.start()
    assert rig.qemu.transcript.count("cont") == 1


async def test_a_debugger_on_the_process_is_named(adopt: Adopt) -> None:
    rig = await adopt(status="inmigrate")
    rig.reach.fails = pb.REACH_ERROR_CODE_TRACED
    with pytest.raises(VmferryError, match="traced") as caught:
        await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)
    assert caught.value.reason is Reason.VMM_REFUSED
    assert not rig.pager.messages and not rig.qemu.fdsets, "the device was taken back"
    await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)


@pytest.mark.parametrize(
    ("layout", "vcpus", "words"),
    [
        (MemoryLayout((MemoryRegion(Gpa(0), LAYOUT.regions[0].size * 2, 4096, LAYOUT.regions[0].backing),)), 1, "0x8"),
        (LAYOUT, 2, "-smp 2"),
    ],
    ids=["more memory", "more vCPUs"],
)
async def test_a_waiting_qemu_that_does_not_fit_is_not_touched(
    adopt: Adopt, layout: MemoryLayout, vcpus: int, words: str
) -> None:
    rig = await adopt(status="inmigrate")
    with pytest.raises(VmferryError, match=words):
        await rig.vmm.prepare(layout, vcpus, FEATURES, rig.pager.path)
    assert not rig.reach.calls and not rig.pager.messages and not rig.qemu.fdsets


async def test_memory_on_a_disk_is_refused(adopt: Adopt) -> None:
    rig = await adopt(status="inmigrate")
    rig.reach.kind = pb.MAPPING_KIND_FILE
    with pytest.raises(VmferryError, match="takes no pages on demand"):
        await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)
    assert not rig.reach.calls


@pytest.mark.parametrize("fault", ["refuse", "silent", "lie"])
@pytest.mark.parametrize("command", ["add-fd", "query-fdsets", "migrate-set-capabilities", "getfd", "migrate-incoming"])
async def test_a_fault_before_the_start_runs_no_vcpu(adopt: Adopt, command: str, fault: str) -> None:
    rig = await adopt(status="inmigrate")
    rig.qemu.faults[command] = fault  # type: ignore[assignment]
    rig.wait_within(SOON_S if fault == "silent" else WITHIN_S)
    with pytest.raises(VmferryError):
        await rig.vmm.prepare(LAYOUT, 1, FEATURES, rig.pager.path)
        await rig.vmm.load_state(STATE)
        raise VmferryError(Reason.VMM_REFUSED, "the lie was of no consequence")
    assert "cont" not in rig.qemu.transcript
    rig.qemu.faults.clear()
    rig.wait_within(WITHIN_S)
    await rig.vmm.reset()
