"""Faults of a migration before its switchover: each is named, the guest runs on in its place, and the destination keeps
nothing."""

from __future__ import annotations

import asyncio
import json
import resource
import shlex
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from tests.support import SUPPORT
from tests.support.scenario.fake_vmm import Attachment, IncomingVmm, frame, hello, read_frame
from tests.support.scenario.harness import (
    SMALL,
    SOON_S,
    Pair,
    cast,
    ended,
    goes_on,
    guest_at_home,
    nothing_is_left,
    reaches,
    shape,
    two_hosts,
    unharmed,
)
from vmferry.client.refusal import RefusedError
from vmferry.demo.patience import patient
from vmferry.demo.programs import find_program
from vmferry.demo.stage import until
from vmferry.units import GIB, KIB, MIB
from vmferry.v1 import migrations_pb2, peer_pb2, peer_pb2_grpc

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


async def refused_or_failed(pair: Pair, vm: str, to: str) -> str:
    """The reason with which the migration was refused at once, or failed."""
    try:
        await pair.home_api.create(f"m-{vm}", vm, to)
    except RefusedError as error:
        return error.reason
    last = await ended(pair.home_api, f"m-{vm}")
    assert last.phase == migrations_pb2.PHASE_FAILED, last
    assert last.reason, "words with the remedy"
    return last.reason_code


async def test_unknown_vm(pair: Pair, vm):
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "VM_UNKNOWN"
    await nothing_is_left(pair, vm)


async def test_destination_down(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        reason = await refused_or_failed(pair, vm, f"127.0.0.1:{taken.getsockname()[1]}")
    assert reason == "DESTINATION_UNREACHABLE"
    await unharmed(pair, guest)


class _PeerOfTomorrow(peer_pb2_grpc.PeerServicer):
    async def Hello(self, request, context):  # noqa: N802  # gRPC names the method
        return peer_pb2.HelloReply(protocol_version=2, host="tomorrow")


@asynccontextmanager
async def peer_of_tomorrow():
    server = grpc.aio.server()
    peer_pb2_grpc.add_PeerServicer_to_server(_PeerOfTomorrow(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def test_destination_speaks_another_version(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    async with peer_of_tomorrow() as address:
        assert await refused_or_failed(pair, vm, address) == "DESTINATION_VERSION"
    await unharmed(pair, guest)


async def test_no_vmm_waits_at_the_destination(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "DESTINATION_NO_VMM"
    await unharmed(pair, guest)


async def test_destination_already_has_that_vm(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    twin = await pair.stage.guest(vm, pair.away, "process", shape(seed=2))
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "DESTINATION_HAS_VM"
    await unharmed(pair, guest)
    assert (await goes_on(twin)).wrong_bytes == 0, "the VM that was there is not harmed either"


async def test_vm_already_migrating(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    await pair.stage.guest(vm, pair.away, "process", None, ("--stall-at", "prepare"))
    await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)
    with pytest.raises(RefusedError) as refused:
        await pair.home_api.create(f"m2-{vm}", vm, pair.away.place.peer)
    assert refused.value.reason == "VM_ALREADY_MIGRATING"
    assert refused.value.remedy
    again = await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)
    assert again.migration_id == f"m-{vm}", "the same request is the same job"
    with pytest.raises(RefusedError) as other:
        await pair.home_api.create(f"m-{vm}", vm, "127.0.0.1:1")
    assert other.value.reason == "MIGRATION_EXISTS"
    await pair.home_api.cancel(f"m-{vm}")
    assert (await ended(pair.home_api, f"m-{vm}")).phase == migrations_pb2.PHASE_CANCELLED
    await unharmed(pair, guest)


@pytest.mark.parametrize("request_", ["prepare", "load_state"])
@pytest.mark.parametrize(("how", "why"), [("--die-at", "VMM_GONE"), ("--fail-at", "VMM_REFUSED")])
async def test_destination_vmm_goes_wrong_before_the_point_of_no_return(pair: Pair, vm, how, why, request_):
    guest = await guest_at_home(pair, vm)
    await pair.stage.guest(vm, pair.away, "process", None, (how, request_))
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == why
    await unharmed(pair, guest)


@pytest.mark.parametrize("request_", ["prepare", "load_state"])
async def test_destination_vmm_that_never_answers(hasty_pair: Pair, vm, request_):
    guest = await guest_at_home(hasty_pair, vm)
    await hasty_pair.stage.guest(vm, hasty_pair.away, "process", None, ("--stall-at", request_))
    assert await refused_or_failed(hasty_pair, vm, hasty_pair.away.place.peer) == "VMM_TIMEOUT"
    await unharmed(hasty_pair, guest)


@pytest.mark.parametrize("request_", ["attach_memory", "stop", "save_state"])
async def test_source_vmm_refuses_before_the_point_of_no_return(pair: Pair, vm, request_):
    guest = await guest_at_home(pair, vm, "--fail-at", request_)
    await pair.stage.guest(vm, pair.away, "process", None)
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "VMM_REFUSED"
    await unharmed(pair, guest)


@pytest.mark.parametrize("request_", ["attach_memory", "stop", "save_state"])
async def test_source_vmm_that_never_answers(hasty_pair: Pair, vm, request_):
    guest = await guest_at_home(hasty_pair, vm, "--stall-at", request_)
    await hasty_pair.stage.guest(vm, hasty_pair.away, "process", None)
    assert await refused_or_failed(hasty_pair, vm, hasty_pair.away.place.peer) == "VMM_TIMEOUT"
    await unharmed(hasty_pair, guest)


@pytest.mark.parametrize("request_", ["attach_memory", "stop", "save_state"])
async def test_source_vmm_gone_leaves_nothing_at_the_destination(pair: Pair, vm, request_):
    guest = await guest_at_home(pair, vm, "--die-at", request_)
    await pair.stage.guest(vm, pair.away, "process", None)
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "VMM_GONE"
    assert await guest.process.ended(SOON_S)
    await nothing_is_left(pair, vm)


async def test_destination_vmm_that_dies_after_the_point_of_no_return_does_not_bring_the_source_back(pair: Pair, vm):
    """At most one copy runs: a committed VM is lost with its VMM, and the job says so."""
    guest = await guest_at_home(pair, vm)
    await pair.stage.guest(vm, pair.away, "process", None, ("--die-at", "start"))
    await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)
    last = await ended(pair.home_api, f"m-{vm}")
    assert last.phase in (migrations_pb2.PHASE_LOST, migrations_pb2.PHASE_FAILED), last
    assert last.reason_code
    if last.phase == migrations_pb2.PHASE_FAILED:
        await unharmed(pair, guest)  # the destination had proved that it refused
    else:
        before = await guest.admin.report() if guest.process.alive else None
        await asyncio.sleep(0.3)
        if before is not None and guest.process.alive:
            assert (await guest.admin.report()).touches == before.touches


# The VMM's control socket.


def said(vmm_socket: Path, sent: bytes) -> tuple[dict[str, object], bool]:
    """The daemon's answer, and whether it closed the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        control.settimeout(patient(10))
        control.connect(str(vmm_socket))
        control.sendall(sent)
        answer = read_frame(control)
        return answer, read_frame(control) == {}


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        pytest.param(lambda vm: (65 << 20).to_bytes(4, "big"), "", id="too long"),
        pytest.param(lambda vm: frame(b"{not json"), "", id="not JSON"),
        pytest.param(lambda vm: frame(b"[1, 2]"), "", id="not an object"),
        pytest.param(lambda vm: frame(hello(vm, pid="4711")), "pid", id="wrong type"),
        pytest.param(lambda vm: frame({k: v for k, v in hello(vm).items() if k != "vm"}), "vm", id="field missing"),
        pytest.param(lambda vm: frame(hello("no spaces please")), "vm", id="wrong name"),
        pytest.param(lambda vm: frame(hello(vm, state="asleep")), "state", id="unknown state"),
        pytest.param(lambda vm: frame(hello(vm, version=2)), "version", id="another version"),
    ],
)
async def test_a_malformed_message_gets_an_error_that_names_the_field(pair: Pair, vm, sent, field):
    bystander = await guest_at_home(pair, f"by-{vm}"[:30])
    answer, closed = await asyncio.to_thread(said, pair.home.vmm_socket, sent(vm))
    assert answer["type"] == "error"
    assert field in str(answer["field"])
    assert answer["message"]
    assert closed
    assert {m.vm async for m in pair.home_api.list_machines()} >= {bystander.vm}, "other VMs stay connected"
    assert (await goes_on(bystander)).wrong_bytes == 0
    await bystander.process.kill()


# The memory connection of the destination.


def no_descriptor(memory: Attachment) -> None:
    memory.descriptors = []


def too_many_descriptors(memory: Attachment) -> None:
    memory.descriptors = [memory.uffd] * 65


def not_json(memory: Attachment) -> None:
    memory.message = b"\x00nonsense"


def wrong_type(memory: Attachment) -> None:
    memory.message["regions"][0]["size"] = "big"


def too_long(memory: Attachment) -> None:
    memory.message = json.dumps({**memory.message, "padding": "x" * (65 << 10)}).encode()


def one_region_more(memory: Attachment) -> None:
    memory.message["regions"].append({**memory.message["regions"][0], "gpa": 1 << 40})


def other_size(memory: Attachment) -> None:
    memory.message["regions"][0]["size"] -= 4096


def other_gpa(memory: Attachment) -> None:
    memory.message["regions"][0]["gpa"] += 4096


def other_page_size(memory: Attachment) -> None:
    memory.message["regions"][0]["page_size"] = 2 * MIB


@pytest.mark.parametrize(
    "spoil",
    [
        no_descriptor,
        too_many_descriptors,
        not_json,
        wrong_type,
        too_long,
        one_region_more,
        other_size,
        other_gpa,
        other_page_size,
    ],
)
async def test_memory_that_is_attached_wrongly_fails_the_migration(pair: Pair, vm, spoil):
    guest = await guest_at_home(pair, vm)
    vmm = IncomingVmm(vm, spoil)
    await vmm.connect(pair.away.vmm_socket)
    try:
        assert await refused_or_failed(pair, vm, pair.away.place.peer) in {"VMM_REFUSED", "LAYOUT_MISMATCH"}
        if spoil not in (too_many_descriptors, too_long, no_descriptor):
            assert vmm.pager_said["type"] == "error", vmm.pager_said
            assert vmm.pager_said["message"]
    finally:
        await vmm.close()
    await unharmed(pair, guest)


async def test_memory_that_is_attached_rightly_is_accepted(pair: Pair, vm):
    """The daemon refuses the stand-in above only for the field that a test spoils."""
    await guest_at_home(pair, vm)
    vmm = IncomingVmm(vm, lambda memory: None)
    await vmm.connect(pair.away.vmm_socket)
    try:
        await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)

        async def attached() -> bool:
            return vmm.pager_said.get("type") == "attached"

        await until("the pager to accept", attached, SOON_S)
    finally:
        await vmm.close()


def address_space(pid: int) -> int:
    """Bytes that a process has mapped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * KIB for line in status.splitlines() if line.startswith("VmSize:"))


async def test_no_memory_at_the_destination(pair: Pair, vm):
    guest = await guest_at_home(pair, vm)
    waiting = await pair.stage.guest(vm, pair.away, "process", None)
    limit = address_space(waiting.process.pid) + SMALL // 2
    resource.prlimit(waiting.process.pid, resource.RLIMIT_AS, (limit, GIB))
    assert await refused_or_failed(pair, vm, pair.away.place.peer) == "DESTINATION_NO_MEMORY"
    await unharmed(pair, guest)


async def test_kernel_without_poison(programs, uffd_poison, tmp_path, vm):
    wrapper = tmp_path / "vmferry-pager"
    filtered = SUPPORT / "scenario/without_poison.py"
    line = shlex.join([sys.executable, str(filtered), str(find_program("vmferry-pager"))])
    wrapper.write_text(f'#!/bin/sh\nexec {line} "$@"\n')
    wrapper.chmod(0o755)
    async with two_hosts(away={"pager": f'program = "{wrapper}"'}) as pair:
        players = await cast(pair, vm, "process", shape())
        assert await refused_or_failed(pair, vm, pair.away.place.peer) == "KERNEL_LACKS_FEATURE"
        await unharmed(pair, players.source)


async def test_a_cancelled_migration_can_be_tried_again(pair: Pair, vm):
    """Nothing behind: the second attempt, with a VMM that behaves, completes."""
    guest = await guest_at_home(pair, vm)
    first = await pair.stage.guest(vm, pair.away, "process", None, ("--stall-at", "prepare"))
    await pair.home_api.create(f"m-{vm}", vm, pair.away.place.peer)
    await reaches(pair.home_api, f"m-{vm}", migrations_pb2.PHASE_PREPARING)
    await pair.home_api.cancel(f"m-{vm}")
    assert (await ended(pair.home_api, f"m-{vm}")).phase == migrations_pb2.PHASE_CANCELLED
    await unharmed(pair, guest)
    await first.process.kill()
    second = await pair.stage.guest(vm, pair.away, "process", None)
    await pair.home_api.create(f"m2-{vm}", vm, pair.away.place.peer)
    assert (await ended(pair.home_api, f"m2-{vm}")).phase == migrations_pb2.PHASE_COMPLETED
    assert (await goes_on(second)).wrong_bytes == 0
