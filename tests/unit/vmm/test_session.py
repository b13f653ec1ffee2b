"""The daemon's end over a real unix socket, against a VMM with canned answers."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.vmm import DEVICE_STATE_LIMIT
from vmferry.units import MIB, Gpa
from vmferry.vmm import session as session_module
from vmferry.vmm.server import VmmCallbacks, VmmServer
from vmferry.vmm.session import ERRORS_AT_ONCE, VmmDeadlines, VmmSession

REGION = {"gpa": 0, "hva": 4096, "size": MIB, "page_size": 4096, "backing": "memfd"}
LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), MIB, 4096, Backing.MEMFD),))
HELLO: dict[str, Any] = {
    "type": "hello",
    "version": 1,
    "vm": "web-1",
    "pid": 42,
    "platform": "x86_64/kvm",
    "vcpus": 2,
    "regions": [REGION],
    "abilities": ["source"],
    "state": "running",
}
INCOMING = {**HELLO, "state": "incoming", "regions": [], "vcpus": 0, "pid": 43}
REPORT = {
    "type": "memory_error",
    "seq": 1,
    "gpa": 8192,
    "lsb": 12,
    "severity": "AR",
    "guest_visible": True,
    "thread": 7,
}
PATIENCE_S = patient(20)


class FakeVmm:
    """A connection to the daemon. It sends the messages of the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, message: Any) -> None:
        body = json.dumps(message).encode()
        self.say_raw(len(body).to_bytes(4, "big") + body)

    def say_raw(self, data: bytes) -> None:
        self._writer.write(data)

    async def hear(self) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE_S):
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            message: dict[str, Any] = json.loads(await self._reader.readexactly(length))
            return message

    async def hear_the_end(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            assert await self._reader.read() == b""

    def leave(self) -> None:
        self._writer.close()


class Daemon:
    """The server under test, and the calls of its callbacks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[tuple[str, LedgerEntry]] = []
        self.resets: list[tuple[str, int]] = []
        """The VM, and the number of errors that were recorded before."""
        self.record_fails = 0
        self.record_calls = 0
        self.may_record = asyncio.Event()
        self.may_record.set()
        self.events: asyncio.Queue[tuple[str, VmmSession]] = asyncio.Queue()
        callbacks = VmmCallbacks(
            self._record,
            lambda vmm: self.events.put_nowait(("connected", vmm)),
            lambda vmm: self.events.put_nowait(("disconnected", vmm)),
            self._reset,
        )
        self.server = VmmServer(path, callbacks, lambda: 123, VmmDeadlines(hello_s=PATIENCE_S, stop_s=PATIENCE_S))

    async def _record(self, vm: str, entries: Sequence[LedgerEntry]) -> None:
        await self.may_record.wait()
        self.record_calls += 1
        if self.record_fails:
            self.record_fails -= 1
            raise VmferryError(Reason.STORE_FAILED, "disk full")
        self.errors += [(vm, entry) for entry in entries]

    async def _reset(self, vm: str) -> None:
        if self.record_fails:
            self.record_fails -= 1
            raise VmferryError(Reason.PAGER_FAILED, "no answer")
        self.resets.append((vm, len(self.errors)))

    async def connect(self) -> FakeVmm:
        return FakeVmm(*await asyncio.open_unix_connection(self.path))

    async def welcome(self, hello: dict[str, Any]) -> tuple[FakeVmm, VmmSession]:
        vmm = await self.connect()
        vmm.say(hello)
        assert await vmm.hear() == {"type": "welcome", "version": 1}
        return vmm, await self.event("connected")

    async def event(self, name: str) -> VmmSession:
        async with asyncio.timeout(PATIENCE_S):
            got, vmm = await self.events.get()
        assert got == name
        return vmm


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    monkeypatch.setattr(session_module, "RECORD_RETRY_S", 0.01)
    made = Daemon(tmp_path / "vmm.sock")
    serving = asyncio.create_task(made.server.serve())
    await made.server.listening.wait()
    yield made
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    assert not made.path.exists()


async def test_a_vmm_is_known_while_it_is_connected(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome(HELLO)
    assert daemon.server.running("web-1") is session
    assert daemon.server.incoming("web-1") is None
    assert session.identity.layout == LAYOUT
    vmm.leave()
    assert await daemon.event("disconnected") is session
    assert daemon.server.all() == ()
    assert await session.gone() == "closed the connection"
    with pytest.raises(VmferryError) as caught:
        await session.stop()
    assert caught.value.reason is Reason.VMM_GONE


class Others:
    """VMMs of another kind: a QEMU that was adopted."""

    def __init__(self, *vmms: VmmSession) -> None:
        self._vmms = vmms

    def running(self, vm: str) -> VmmSession | None:
        raise AssertionError(vm)

    def incoming(self, vm: str) -> VmmSession | None:
        raise AssertionError(vm)

    def all(self) -> Sequence[VmmSession]:
        return self._vmms


async def test_the_name_of_a_vmm_of_another_kind_is_taken(daemon: Daemon, tmp_path: Path) -> None:
    _, known = await daemon.welcome(HELLO)
    second = Daemon(tmp_path / "second.sock")
    second.server.share_names_with(Others(known))
    serving = asyncio.create_task(second.server.serve())
    await second.server.listening.wait()
    vmm = await second.connect()
    vmm.say({**HELLO, "pid": 44})
    said = await vmm.hear()
    assert (said["code"], said["field"]) == ("BAD_STATE", "vm")
    assert "pid 42" in said["message"]
    await second.welcome(INCOMING)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def test_state_follows_the_answers_of_a_source(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome(HELLO)
    for call, answer, state in [
        (session.attach_memory(Path("/run/x")), {}, "running"),
        (session.stop(), {"stopped_us": 5}, "stopped"),
        (session.resume(), {}, "running"),
        (session.stop(), {"stopped_us": 5}, "stopped"),
        (session.abandon(), {}, "gone"),
    ]:
        asked = asyncio.ensure_future(call)
        request = await vmm.hear()
        vmm.say({"type": "reply", "id": request["id"], **answer})
        await asked
        assert session.identity.state == state
    assert daemon.server.running("web-1") is None


async def test_a_destination_from_incoming_to_running(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome(INCOMING)
    prepare = session.prepare(LAYOUT, 2, ["UFFD_FEATURE_POISON"], Path("/run/m"))
    for call, answer, state, fields in [
        (prepare, {}, "prepared", {"vcpus": 2, "uffd_features": ["UFFD_FEATURE_POISON"], "socket": "/run/m"}),
        (session.load_state(b"\0\xff"), {}, "loaded", {"state": "AP8="}),
        (session.start(), {"started_us": 9}, "running", {}),
        (session.migration_complete(True), {}, "running", {"keep_uffd": True}),
    ]:
        asked = asyncio.ensure_future(call)
        request = await vmm.hear()
        assert fields.items() <= request.items()
        vmm.say({"type": "reply", "id": request["id"], **answer})
        await asked
        assert session.identity.state == state
    assert session.identity.layout == LAYOUT
    assert daemon.server.running("web-1") is session


async def test_device_state_comes_back_as_bytes(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome({**HELLO, "state": "stopped"})
    asked = asyncio.ensure_future(session.save_state())
    vmm.say({"type": "reply", "id": (await vmm.hear())["id"], "state": "AP8="})
    assert await asked == b"\0\xff"


async def test_the_largest_device_state_fits_into_a_frame_both_ways(daemon: Daemon) -> None:
    """The daemons agree on the same limit: `tests/unit/peer` sends a state of this size too."""
    state = bytes(DEVICE_STATE_LIMIT)
    stopped, saving = await daemon.welcome({**HELLO, "state": "stopped"})
    asked = asyncio.ensure_future(saving.save_state())
    number = (await stopped.hear())["id"]
    stopped.say({"type": "reply", "id": number, "state": base64.b64encode(state).decode()})
    assert await asked == state
    waiting, loading = await daemon.welcome({**INCOMING, "vm": "web-2"})
    asked_to_load = asyncio.ensure_future(loading.load_state(state))
    heard = await waiting.hear()
    assert len(base64.b64decode(heard["state"])) == DEVICE_STATE_LIMIT
    waiting.say({"type": "reply", "id": heard["id"]})
    await asked_to_load


async def test_a_hello_tells_how_large_the_device_state_can_be(daemon: Daemon) -> None:
    _, session = await daemon.welcome({**HELLO, "state_bytes": 70 * MIB})
    assert session.identity.state_bytes == 70 * MIB


@pytest.mark.parametrize(
    ("code", "reason"), [("BAD_STATE", Reason.VMM_REFUSED), ("NO_MEMORY", Reason.DESTINATION_NO_MEMORY)]
)
async def test_a_refusal_carries_the_vmms_words(daemon: Daemon, code: str, reason: Reason) -> None:
    vmm, session = await daemon.welcome(INCOMING)
    asked = asyncio.ensure_future(session.prepare(LAYOUT, 2, [], Path("/run/m")))
    refusal = {"type": "error", "id": (await vmm.hear())["id"], "code": code, "field": "regions", "message": "too big"}
    vmm.say(refusal)
    with pytest.raises(VmferryError, match=f"{code}: regions: too big") as caught:
        await asked
    assert caught.value.reason is reason
    assert session.identity.state == "incoming"


async def test_a_late_answer_still_counts_for_the_state(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome(HELLO)
    session._deadlines = VmmDeadlines(stop_s=0.05)
    with pytest.raises(VmferryError) as caught:
        await session.stop()
    assert caught.value.reason is Reason.VMM_TIMEOUT
    vmm.say({"type": "reply", "id": (await vmm.hear())["id"], "stopped_us": 1})
    asked = asyncio.ensure_future(session.attach_memory(Path("/run/x")))
    vmm.say({"type": "reply", "id": (await vmm.hear())["id"]})
    await asked
    assert session.identity.state == "stopped"


async def test_pending_requests_fail_when_the_vmm_dies(daemon: Daemon) -> None:
    vmm, session = await daemon.welcome(HELLO)
    asked = asyncio.ensure_future(session.save_state())
    await vmm.hear()
    vmm.leave()
    with pytest.raises(VmferryError) as caught:
        await asked
    assert caught.value.reason is Reason.VMM_GONE


@pytest.mark.parametrize(
    ("answer", "field"),
    [({"type": "reply", "id": 99}, "id"), ({"type": "reply", "id": 1}, "state"), ({**HELLO}, "type")],
)
async def test_a_wrong_answer_ends_the_connection(daemon: Daemon, answer: dict[str, Any], field: str) -> None:
    vmm, session = await daemon.welcome({**HELLO, "state": "stopped"})
    asked = asyncio.ensure_future(session.save_state())
    await vmm.hear()
    vmm.say(answer)
    with pytest.raises(VmferryError) as caught:
        await asked
    assert caught.value.reason is Reason.VMM_PROTOCOL
    said = await vmm.hear()
    assert (said["type"], said["code"], said["field"]) == ("error", "BAD_MESSAGE", field)
    await vmm.hear_the_end()


async def test_errors_are_acknowledged_only_once_recorded(daemon: Daemon) -> None:
    daemon.record_fails = 2
    vmm, _ = await daemon.welcome(HELLO)
    vmm.say(REPORT)
    vmm.say({**REPORT, "seq": 2, "gpa": 4096, "severity": None, "guest_visible": False})
    assert await vmm.hear() == {"type": "recorded", "seq": 1}
    assert await vmm.hear() == {"type": "recorded", "seq": 2}
    assert [(vm, entry.gpa) for vm, entry in daemon.errors] == [("web-1", 8192), ("web-1", 4096)]
    assert daemon.record_fails == 0


async def test_a_reset_of_the_guest_takes_its_turn_between_errors(daemon: Daemon) -> None:
    """An error before the reset must not come back behind it."""
    daemon.may_record.clear()
    vmm, _ = await daemon.welcome(HELLO)
    vmm.say(REPORT)
    vmm.say({"type": "guest_reset", "seq": 2})
    vmm.say({**REPORT, "seq": 3, "gpa": 4096})
    vmm.say({"type": "guest_reset", "seq": 4})
    daemon.may_record.set()
    assert [(await vmm.hear())["seq"] for _ in range(4)] == [1, 2, 3, 4]
    assert daemon.resets == [("web-1", 1), ("web-1", 2)]


async def test_a_reset_that_no_pager_took_is_told_again(daemon: Daemon) -> None:
    daemon.record_fails = 2
    vmm, _ = await daemon.welcome(HELLO)
    vmm.say({"type": "guest_reset", "seq": 1})
    assert await vmm.hear() == {"type": "recorded", "seq": 1}
    assert daemon.resets == [("web-1", 0)]


async def test_reply_does_not_wait_behind_errors_that_cannot_be_recorded_yet(daemon: Daemon) -> None:
    daemon.may_record.clear()
    vmm, session = await daemon.welcome(HELLO)
    count = 3 * ERRORS_AT_ONCE
    for seq in range(1, count + 1):
        vmm.say({**REPORT, "seq": seq})
    asked = asyncio.ensure_future(session.stop())
    request = await vmm.hear()
    vmm.say({"type": "reply", "id": request["id"], "stopped_us": 1})
    await asked
    daemon.may_record.set()
    assert [(await vmm.hear())["seq"] for _ in range(count)] == list(range(1, count + 1))
    assert len(daemon.errors) == count
    assert daemon.record_calls <= 2 + count // ERRORS_AT_ONCE, "one write takes many errors"


async def test_vmm_that_reports_without_end_is_told_so_and_ended(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmferry.vmm.session.ERRORS_MAX", 3)
    daemon.may_record.clear()
    vmm, _ = await daemon.welcome(HELLO)
    for seq in range(1, 9):
        vmm.say({**REPORT, "seq": seq})
    said = await vmm.hear()
    assert (said["type"], said["code"], said["field"]) == ("error", "BAD_MESSAGE", "seq")
    await vmm.hear_the_end()


@pytest.mark.parametrize(
    ("data", "code", "field"),
    [
        (b"\xff\xff\xff\xff", "BAD_MESSAGE", ""),
        (b"\0\0\0\4nope", "BAD_MESSAGE", ""),
        (b"", "BAD_MESSAGE", "type"),
        ({"type": "reply", "id": 1}, "BAD_MESSAGE", "type"),
        ({**HELLO, "version": 9}, "VERSION", "version"),
        ({**HELLO, "vm": "a b"}, "BAD_MESSAGE", "vm"),
        (HELLO, "BAD_STATE", "vm"),
        ({**HELLO, "vm": "web-2", "regions": [{**REGION, "size": 5}]}, "BAD_MESSAGE", "regions[0].size"),
    ],
)
async def test_a_bad_vmm_is_told_why_and_harms_nobody(daemon: Daemon, data: Any, code: str, field: str) -> None:
    good, session = await daemon.welcome(HELLO)
    if data == b"":
        daemon.server._deadlines = VmmDeadlines(hello_s=0.05)
    bad = await daemon.connect()
    bad.say_raw(data) if isinstance(data, bytes) else bad.say(data)
    said = await bad.hear()
    assert (said["type"], said["code"], said["field"]) == ("error", code, field)
    await bad.hear_the_end()
    asked = asyncio.ensure_future(session.resume())
    good.say({"type": "reply", "id": (await good.hear())["id"]})
    await asked


async def test_one_runs_and_one_waits(daemon: Daemon) -> None:
    _, running = await daemon.welcome(HELLO)
    _, waiting = await daemon.welcome(INCOMING)
    assert daemon.server.running("web-1") is running
    assert daemon.server.incoming("web-1") is waiting


async def test_the_socket_is_for_its_owner_and_not_shared(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o600
    second = VmmServer(daemon.path, VmmCallbacks(daemon._record), lambda: 0)
    with pytest.raises(VmferryError, match="served by another process"):
        await second.serve()
    assert daemon.path.exists()


async def test_a_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vmm.sock"
    listener = await asyncio.start_unix_server(lambda _r, _w: None, path)
    listener.close()
    await listener.wait_closed()
    assert path.is_socket()
    made = Daemon(path)
    serving = asyncio.create_task(made.server.serve())
    await made.server.listening.wait()
    await made.welcome(HELLO)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    path.write_text("precious")
    with pytest.raises(VmferryError, match="no socket"):
        await made.server.serve()
    assert path.read_text() == "precious"


@pytest.mark.parametrize(("name", "what"), [("a" * 120, "107 bytes"), ("nowhere/vmm.sock", "no directory")])
async def test_an_unusable_path_is_refused_with_its_fault(tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(VmferryError, match=what):
        await Daemon(tmp_path / name).server.serve()
