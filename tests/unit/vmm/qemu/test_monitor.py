"""The client against monitors that are no QEMU: slow, closed, lying, hostile. No case may hang."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.vmm.qemu.monitor import AddedFd, Monitor

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
)
SOON_S = 0.3
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def monitor_at(path: Path, serve: Serve) -> AsyncIterator[Path]:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(one, path)
    try:
        yield path
    finally:
        server.close()


async def asked(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next command: an object that no line ends."""
    text = b""
    while text.count(b"{") != text.count(b"}") or not text.strip():
        byte = await reader.read(1)
        if not byte:
            raise ConnectionResetError
        text += byte
    command: dict[str, Any] = json.loads(text)
    return command


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    await answer(reader, writer, {})


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, value: object) -> None:
    command = await asked(reader)
    writer.write(json.dumps({"return": value, **({"id": command["id"]} if "id" in command else {})}).encode() + b"\n")
    await writer.drain()


async def for_ever(*_: object) -> None:
    await asyncio.Event().wait()


async def refused(path: Path, within_s: float = SOON_S) -> VmferryError:
    with pytest.raises(VmferryError) as caught:
        await Monitor.connect(path, within_s)
    assert str(path) in caught.value.message
    return caught.value


async def test_a_monitor_that_is_not_there(tmp_path: Path) -> None:
    assert (await refused(tmp_path / "none")).reason is Reason.VMM_GONE


async def test_a_monitor_that_another_client_holds_sends_no_greeting(tmp_path: Path) -> None:
    async with monitor_at(tmp_path / "m", for_ever) as path:
        error = await refused(path)
    assert error.reason is Reason.VMM_TIMEOUT
    assert "serves one client" in error.remedy


@pytest.mark.parametrize("greeting", [b"", b"hello\n", b"{}\n", b'{"QMP": 3}\n', b"\xff\xfe\n", b"[" * 5000 + b"\n"])
async def test_a_greeting_that_is_none(tmp_path: Path, greeting: bytes) -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await writer.drain()

    async with monitor_at(tmp_path / "m", serve) as path:
        assert (await refused(path, 5.0)).reason is Reason.VMM_GONE


async def test_an_answer_arrives(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await answer(reader, writer, {"name": "web-1"})

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        assert await monitor.ask("query-name", 5.0) == {"name": "web-1"}
        await monitor.close()


async def test_lines_of_the_human_monitor_end_in_a_bare_newline(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await answer(reader, writer, "FlatView #0\r\n Root memory region: system\r\n")

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        assert await monitor.human("info mtree -f", 5.0) == "FlatView #0\n Root memory region: system\n"
        await monitor.close()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", Reason.VMM_GONE),
        (b"nonsense\n", Reason.VMM_GONE),
        (b'{"return": {}, "id": {}}\n', Reason.VMM_GONE),
        (b'{"return": {}, "id": "other"}\n', Reason.VMM_GONE),
        (b'{"error": {"class": "GenericError", "desc": "no"}}\n', Reason.VMM_GONE),
        (b'{"error": {"class": "GenericError", "desc": "no"}, "id": ID}\n', Reason.VMM_REFUSED),
        (b'{"error": 7, "id": ID}\n', Reason.VMM_GONE),
        (b'{"neither": 7, "id": ID}\n', Reason.VMM_GONE),
        (b'{"return": [1], "id": ID}\n', Reason.VMM_PROTOCOL),
        (b'{"event": 3}\n', Reason.VMM_GONE),
        (b"{" + b" " * (11 << 20) + b"}\n", Reason.VMM_GONE),
    ],
)
async def test_an_answer_that_is_none(tmp_path: Path, line: bytes, reason: Reason) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        command = await asked(reader)
        writer.write(line.replace(b"ID", json.dumps(command["id"]).encode()))
        await writer.drain()

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        with pytest.raises(VmferryError) as caught:
            await monitor.ask_for(str, "query-name", 5.0)
        assert caught.value.reason is reason
        assert "query-name" in caught.value.message
        await monitor.close()


async def test_a_monitor_that_answers_nothing_is_cut_off(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await for_ever()

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        with pytest.raises(VmferryError) as caught:
            await monitor.ask("stop", SOON_S)
        assert caught.value.reason is Reason.VMM_TIMEOUT
        with pytest.raises(VmferryError):  # more than a socket's buffer holds, which nobody reads
            await monitor.ask("human-monitor-command", SOON_S, {"command-line": "x" * (8 << 20)})
        async with asyncio.timeout(patient(20)):
            await monitor.close()


async def test_a_late_answer_is_not_taken_for_the_next(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        first = await asked(reader)
        second = await asked(reader)
        for command, value in ((first, "late"), (second, "own")):
            writer.write(json.dumps({"return": value, "id": command["id"]}).encode() + b"\n")
        await writer.drain()

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        with pytest.raises(VmferryError):
            await monitor.ask("query-one", SOON_S)
        assert await monitor.ask("query-other", 5.0) == "own"
        await monitor.close()


async def test_events_are_heard_also_between_a_command_and_its_answer(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        command = await asked(reader)
        stamp = {"timestamp": {"seconds": 1, "microseconds": 2}}
        for event in (
            {"event": "RESET", "data": {"guest": True}},
            {"event": "MIGRATION", "data": {"status": "active"}},
        ):
            writer.write(json.dumps({**event, **stamp}).encode() + b"\n")
        writer.write(json.dumps({"return": "done", "id": command["id"]}).encode() + b"\n")
        writer.write(b'{"event": "MIGRATION", "data": 4}\n')
        await writer.drain()
        await for_ever()

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        heard: list[str] = []
        monitor.on_event(lambda name, _: heard.append(name))
        with monitor.events("MIGRATION") as states:
            assert await monitor.ask("stop", 5.0) == "done"
            async with asyncio.timeout(patient(5)):
                assert [await states.get(), await states.get()] == [{"status": "active"}, {}]
        assert heard == ["RESET", "MIGRATION", "MIGRATION"]
        await monitor.close()


async def test_the_end_of_the_connection_is_told(tmp_path: Path) -> None:
    leave = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greet(reader, writer)
        await leave.wait()

    async with monitor_at(tmp_path / "m", serve) as path:
        monitor = await Monitor.connect(path, 5.0)
        ends = asyncio.create_task(monitor.gone())
        await asyncio.sleep(0)
        assert not ends.done()
        leave.set()
        async with asyncio.timeout(patient(5)):
            assert await ends
        with pytest.raises(VmferryError) as caught:
            await monitor.ask("stop", 5.0)
        assert caught.value.reason is Reason.VMM_GONE
        await monitor.close()


@pytest.mark.parametrize("answered", [{"fdset-id": 3, "fd": 17}, {"fdset-id": 3}, {"fdset-id": "x"}, {}])
def test_a_descriptor_comes_before_its_command(tmp_path: Path, answered: dict[str, object]) -> None:
    """A plain socket in a thread: asyncio drops descriptors."""

    def serve(listener: socket.socket) -> tuple[str, bytes]:
        connection, _ = listener.accept()
        connection.settimeout(patient(10))
        with connection:
            connection.sendall(GREETING)
            connection.recv(4096)
            connection.sendall(b'{"return": {}}\n')
            data, received = b"", []
            while data.count(b"{") > data.count(b"}") or b"{" not in data:
                more, fds, _, _ = socket.recv_fds(connection, 4096, 4)
                data, received = data + more, received + fds
            content = os.pread(received[0], 9, 0)
            for fd in received:
                os.close(fd)
            command = json.loads(data)
            connection.sendall(json.dumps({"return": answered, "id": command["id"]}).encode() + b"\n")
            return str(command["execute"]), content

    async def main() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "m"))
        listener.listen()
        served = asyncio.get_running_loop().run_in_executor(None, serve, listener)
        monitor = await Monitor.connect(tmp_path / "m", 5.0)
        fd = os.memfd_create("state")
        os.write(fd, b"the state")
        if "fd" in answered:
            assert await monitor.add_fd(fd, "x", 5.0) == AddedFd(3, 17)
        else:
            with pytest.raises(VmferryError) as caught:
                await monitor.add_fd(fd, "x", 5.0)
            assert caught.value.reason is Reason.VMM_PROTOCOL
        assert os.fstat(fd).st_size == len(b"the state")
        os.close(fd)
        assert await served == ("add-fd", b"the state")
        await monitor.close()
        listener.close()

    asyncio.run(main())
