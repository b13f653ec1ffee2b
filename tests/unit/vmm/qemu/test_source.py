"""The source side of a QEMU that follows a script: the order of its commands, and its way back after each fault."""

from __future__ import annotations

import pytest

from tests.support.scripted.qemu import LAYOUT, RAM_HVA, Fault, commands_of
from tests.unit.vmm.qemu.conftest import SOON_S, WITHIN_S, Adopt, Rig
from vmferry.errors import Reason, VmferryError
from vmferry.vmm.qemu import stream

SAVE = {"10.0": ["xen-save-devices-state"], "7.2": ["migrate-set-capabilities", "migrate-set-parameters", "migrate"]}
ALL: tuple[Fault, ...] = ("refuse", "silent", "mute", "lie", "other id", "huge")
SOME: tuple[Fault, ...] = ("refuse", "mute")
STEPS: dict[tuple[str, str], tuple[Fault, ...]] = {
    ("10.0", "stop"): ALL,
    ("10.0", "query-status"): SOME,
    ("10.0", "query-fdsets"): SOME,
    ("10.0", "add-fd"): ("refuse", "mute", "lie"),
    ("10.0", "xen-save-devices-state"): ALL,
    ("10.0", "human-monitor-command"): SOME,
    ("7.2", "migrate-set-capabilities"): SOME,
    ("7.2", "query-migrate-parameters"): ("refuse", "lie"),
    ("7.2", "getfd"): SOME,
    ("7.2", "migrate"): ALL,
    ("7.2", "query-migrate"): ("refuse", "lie"),
}
WRONG = [(version, command, fault) for (version, command), faults in STEPS.items() for fault in faults]


async def test_identity_comes_from_qemu_and_the_kernel(adopt: Adopt) -> None:
    rig = await adopt()
    identity = rig.vmm.identity
    assert (identity.vm, identity.pid, identity.state) == ("web-1", rig.qemu.process.pid, "running")
    assert (identity.layout, identity.vcpus) == (LAYOUT, 1)
    assert identity.platform == "x86_64/qemu-kvm/pc-i440fx-10.0"
    assert not rig.qemu.transcript and not rig.reach.calls, "nothing of the VM changes until it moves"


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_a_source_from_running_to_gone(adopt: Adopt, version: str) -> None:
    rig = await adopt(version=version)
    await rig.vmm.attach_memory(rig.pager.path)
    (message,) = rig.pager.messages
    assert (message["role"], message["pid"]) == ("source", rig.qemu.process.pid)
    assert message["regions"][0]["base_host_virt_addr"] == RAM_HVA
    await rig.vmm.stop()
    assert rig.qemu.marks == ["vmferry:stopped"]
    state = stream.decode(await rig.vmm.save_state())
    assert state.machine == f"pc-i440fx-{version}"
    assert stream.paused(state.devices) == state.devices, "the destination waits for `cont`"
    assert {block.name for block in state.blocks} >= {"pc.bios", "pc.rom"}
    if version == "10.0":
        for block in state.blocks:
            assert block.contents == rig.qemu.small_block(len(block.contents)), block.name
    await rig.vmm.abandon()
    assert commands_of(rig.qemu.transcript) == ["stop", *SAVE[version], "quit"]
    assert not rig.reach.calls, "no thread of a running VM is stopped"


async def test_state_that_is_asked_for_again_is_the_same_and_saved_once(adopt: Adopt) -> None:
    rig = await adopt()
    await rig.vmm.attach_memory(rig.pager.path)
    await rig.vmm.stop()
    assert await rig.vmm.save_state() == await rig.vmm.save_state()
    assert rig.qemu.transcript.count("xen-save-devices-state") == 1


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_a_source_comes_back(adopt: Adopt, version: str) -> None:
    rig = await adopt(version=version)
    await rig.vmm.attach_memory(rig.pager.path)
    await rig.vmm.stop()
    await rig.vmm.save_state()
    await rig.vmm.resume()
    assert (rig.qemu.status, rig.qemu.marks) == ("running", [])
    assert "announce-self" in rig.qemu.transcript
    limits = [name for name in rig.qemu.transcript if name == "migrate-set-parameters"]
    assert len(limits) == (2 if version == "7.2" else 0), "the operator's bandwidth is restored"


async def attached(adopt: Adopt, version: str) -> Rig:
    rig = await adopt(version=version)
    await rig.vmm.attach_memory(rig.pager.path)
    return rig


@pytest.mark.parametrize(("version", "command", "fault"), WRONG, ids=lambda word: word.replace(" ", "-"))
async def test_a_fault_of_any_command_is_an_error_and_the_vm_comes_back(
    adopt: Adopt, version: str, command: str, fault: Fault
) -> None:
    """Faults that end the connection need a new one, as after a restart of the daemon."""
    rig = await attached(adopt, version)
    rig.qemu.faults[command] = fault
    rig.wait_within(WITHIN_S if fault in {"refuse", "lie"} else SOON_S)
    try:
        await rig.vmm.stop()
        await rig.vmm.save_state()
    except VmferryError as error:
        known = {Reason.VMM_REFUSED, Reason.VMM_TIMEOUT, Reason.VMM_PROTOCOL, Reason.VMM_GONE, Reason.VM_NOT_RUNNING}
        assert error.reason in known
        assert str(rig.qemu.path) in error.message or "pid" in error.message
    rig.qemu.faults.clear()
    rig.wait_within(WITHIN_S)
    if fault in {"huge", "other id"}:
        return  # the library ends such a connection; `test_monitors` has the next one
    await rig.vmm.resume()
    assert rig.qemu.status == "running"
    assert not rig.qemu.marks


async def test_a_vm_that_its_operator_paused_is_not_stopped(adopt: Adopt) -> None:
    rig = await attached(adopt, "10.0")
    rig.qemu.status = "paused"
    with pytest.raises(VmferryError) as caught:
        await rig.vmm.stop()
    assert caught.value.reason is Reason.VM_NOT_RUNNING
    assert "stop" not in rig.qemu.transcript and not rig.qemu.marks


async def test_a_vm_that_somebody_starts_in_the_blackout_does_not_move(adopt: Adopt) -> None:
    """`cont` by an operator in the blackout: its memory is not the source's any more."""
    rig = await attached(adopt, "10.0")
    await rig.vmm.stop()
    rig.qemu.status = "running"
    rig.qemu.say("RESUME")
    with pytest.raises(VmferryError, match="started by somebody") as caught:
        await rig.vmm.save_state()
    assert caught.value.reason is Reason.VMM_REFUSED
    await rig.vmm.resume()
    assert rig.qemu.status == "running"


async def test_blockers_of_qemu_are_refused_before_the_memory_is_attached(adopt: Adopt) -> None:
    rig = await adopt(blocked=["State blocked by non-migratable CPU device (invtsc flag)"])
    with pytest.raises(VmferryError, match="invtsc"):
        await rig.vmm.attach_memory(rig.pager.path)
    assert not rig.pager.messages


async def test_a_pager_that_refuses_the_memory(adopt: Adopt) -> None:
    rig = await adopt()
    rig.pager.answer = {"type": "error", "field": "regions", "message": "are others"}
    with pytest.raises(VmferryError, match="regions: are others") as caught:
        await rig.vmm.attach_memory(rig.pager.path)
    assert caught.value.reason is Reason.VMM_REFUSED


async def test_a_mark_of_a_stop_that_never_came_is_removed_at_the_next_adoption(adopt: Adopt) -> None:
    """Else a VM that its operator pauses later would look as if vmferry had stopped it."""
    rig = await attached(adopt, "10.0")
    rig.qemu.faults["stop"] = "close"
    with pytest.raises(VmferryError):
        await rig.vmm.stop()
    assert rig.qemu.marks == ["vmferry:stopped"]
    await rig.adopt_again()
    assert not rig.qemu.marks
