"""A stand-in for QEMU: a monitor that takes descriptors, answers recorded from a real one, and an idle process.

A test gives a command a fault. The transcript holds all commands that change something.
"""

from __future__ import annotations

import asyncio
import json
import lzma
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vmferry.model.memory import Backing, MemoryLayout, MemoryRegion
from vmferry.units import MIB, Gpa
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu.reach import Process, ReachFailed

GOLDEN = Path(__file__).parents[2] / "unit/vmm/qemu/golden"
RAM_HVA, RAM_BYTES = 0x7F00_0000_0000, 64 * MIB
LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), RAM_BYTES, 4096, Backing.MEMFD),))
UFFD = 77
"""Its number in the process."""
Fault = Literal["refuse", "silent", "mute", "close", "lie", "other id", "huge"]
"""`silent` does not do the command; `mute` does, and does not answer."""
HUGE_LINE = 11 * MIB
_LOOKS = ("query-", "qom-", "human-", "qmp_")
_BLOCK = re.compile(r"0x[0-9a-f]{16}(  r[ow])$", re.MULTILINE)


class Refused(Exception):  # noqa: N818 what happened
    """The command's error."""


@dataclass
class ScriptedQemu:
    """`version` is that of the recordings: "7.2" or "10.0"."""

    path: Path
    version: str = "10.0"
    name: str = "web-1"
    status: str = "running"
    status_after_load: str = "paused"
    loads: str = "completed"
    """The end of an incoming migration."""
    blocked: list[str] = field(default_factory=list)
    kvm: bool = True
    machine_checks: bool = True
    transcript: list[str] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    """By command; each is used once."""
    loaded: bytes = b""
    migration: dict[str, Any] = field(default_factory=dict)
    fdsets: dict[int, tuple[int, str]] = field(default_factory=dict)
    named: dict[str, int] = field(default_factory=dict)
    connections: list[socket.socket] = field(default_factory=list)
    _sets: int = 0

    def start(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.process = subprocess.Popen(["sleep", "infinity"], pass_fds=(self._listener.fileno(),))
        self.small_hva = self._mapped()
        threading.Thread(target=self._accept, daemon=True).start()

    def end(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for fd in [fd for fd, _ in self.fdsets.values()] + list(self.named.values()):
            os.close(fd)
        self.fdsets.clear()
        self.named.clear()
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)

    def cut(self) -> None:
        """Breaks the connections."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def say(self, event: str) -> None:
        message = {"event": event, "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}}
        for connection in self.connections:
            connection.sendall(json.dumps(message).encode() + b"\r\n")

    @property
    def marks(self) -> list[str]:
        return [text for _, text in self.fdsets.values() if text.startswith("vmferry:")]

    def small_block(self, size: int) -> bytes:
        with (Path("/proc") / str(self.process.pid) / "mem").open("rb", buffering=0) as memory:
            return os.pread(memory.fileno(), size, self.small_hva)

    def golden(self, kind: str) -> bytes:
        return lzma.decompress((GOLDEN / f"{self.version}-pc.{kind}.xz").read_bytes())

    def text(self, kind: str) -> str:
        text = (GOLDEN / f"{self.version}-pc.{kind}").read_text()
        return _BLOCK.sub(lambda found: f"{self.small_hva:#018x}{found[1]}", text).replace(
            f"0x0000000004000000 {self.small_hva:#018x}", f"0x0000000004000000 {RAM_HVA:#018x}"
        )

    def _mapped(self) -> int:
        """Readable memory of the process, in the place of all small blocks."""
        while True:
            for line in (Path("/proc") / str(self.process.pid) / "maps").read_text().splitlines():
                first, last = (int(word, 16) for word in line.split()[0].split("-"))
                if "r-xp" in line and "libc" in line and last - first >= MIB // 2:
                    return first

    # the monitor

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        major, minor = self.version.split(".")
        version = {"qemu": {"major": int(major), "minor": int(minor), "micro": 0}, "package": ""}
        text, fds = "", []
        with suppress(OSError):
            connection.sendall(json.dumps({"QMP": {"version": version, "capabilities": ["oob"]}}).encode() + b"\r\n")
            while True:
                data, came, _, _ = socket.recv_fds(connection, 1 << 16, 8)
                fds += came
                text += data.decode()
                if not data:
                    return
                while text.strip():
                    try:
                        command, end = json.JSONDecoder().raw_decode(text.lstrip())
                    except ValueError:
                        break
                    text = text.lstrip()[end:]
                    self._answer(connection, command, fds)

    def _answer(self, connection: socket.socket, command: dict[str, Any], fds: list[int]) -> None:
        name, arguments = command["execute"], command.get("arguments", {})
        if not name.startswith(_LOOKS):
            self.transcript.append(name)
        fault = self.faults.pop(name, None)
        number: object = command.get("id")
        if fault == "silent":
            return
        if fault == "close":
            connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            answer = {"return": self._refuse(name) if fault == "refuse" else self._do(name, arguments, fds)}
        except Refused as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        if fault == "mute":
            return
        if fault == "lie":
            answer = {"return": [["no", 7]]}
        if fault == "huge":
            answer = {"return": "x" * HUGE_LINE}
        if fault == "other id":
            number = "no such"
        connection.sendall(json.dumps({**answer, **({"id": number} if number is not None else {})}).encode() + b"\r\n")

    def _refuse(self, name: str) -> object:
        raise Refused(f"{name} is scripted to fail")

    def _do(self, name: str, arguments: dict[str, Any], fds: list[int]) -> object:
        looks = self._look(name, arguments)
        if looks is not None:
            return looks
        match name:
            case "stop":
                self.status = "paused" if self.status == "running" else self.status
            case "cont":
                self.status = "running"
            case "add-fd":
                self._sets += 1
                self.fdsets[self._sets] = (fds.pop(), arguments.get("opaque", ""))
                return {"fdset-id": self._sets, "fd": 100 + self._sets}
            case "remove-fd":
                os.close(self.fdsets.pop(arguments["fdset-id"])[0])
            case "getfd":
                self.named[arguments["fdname"]] = fds.pop()
            case "xen-save-devices-state":
                fd, _ = self.fdsets[int(arguments["filename"].rpartition("/")[2])]
                os.write(fd, self.golden("saved"))
            case "migrate":
                os.write(self.named[arguments["uri"].partition(":")[2]], self.golden("migrated"))
                self.migration, self.status = {"status": "completed"}, "postmigrate"
            case "migrate-incoming":
                fd = self.named[arguments["uri"].partition(":")[2]]
                self.loaded = os.pread(fd, os.fstat(fd).st_size, 0)
                self.migration = {"status": self.loads}
                self.status = self.status_after_load if self.loads == "completed" else "inmigrate"
            case "quit":
                self.process.kill()
        return {}

    def _look(self, name: str, arguments: dict[str, Any]) -> object:
        """The answer of a command that changes nothing. None: it is another."""
        machine = {"7.2": "pc-i440fx-7.2", "10.0": "pc-i440fx-10.0"}[self.version]
        qom = {"type": f"{machine}-machine", "mce": self.machine_checks, "mca": self.machine_checks}
        major, minor = self.version.split(".")
        answers: dict[str, object] = {
            "query-version": {"qemu": {"major": int(major), "minor": int(minor), "micro": 0}, "package": ""},
            "query-name": {"name": self.name},
            "query-status": {"status": self.status, "running": self.status == "running", "singlestep": False},
            "query-cpus-fast": [{"thread-id": self.process.pid, "qom-path": "/machine/cpu"}],
            "query-kvm": {"enabled": self.kvm, "present": True},
            "query-memdev": [{"id": "pc.ram"}],
            "query-migrate": {**self.migration, **({"blocked-reasons": self.blocked} if self.blocked else {})},
            "query-migrate-parameters": {"max-bandwidth": 1 << 27},
            "query-fdsets": [
                {"fdset-id": number, "fds": [{"fd": 100 + number, "opaque": text}]}
                for number, (_, text) in self.fdsets.items()
            ],
            "qom-list": [],
        }
        if name == "qom-get":
            if arguments["property"] not in qom:
                raise Refused("Property not found")
            return qom[arguments["property"]]
        if name == "human-monitor-command":
            return self._human(arguments["command-line"])
        return answers.get(name)

    def _human(self, line: str) -> str:
        match line.split():
            case ["info", "mtree", "-f"]:
                return self.text("mtree")
            case ["info", "ramblock"]:
                return self.text("ramblock")
            case ["gpa2hva", gpa]:
                return f"Host virtual address for {gpa} (pc.ram) is {RAM_HVA + int(gpa, 16):#x}\r\n"
            case _:
                return ""


@contextmanager
def scripted(path: Path, **differs: Any) -> Iterator[ScriptedQemu]:
    qemu = ScriptedQemu(path, **differs)
    qemu.start()
    try:
        yield qemu
    finally:
        qemu.end()


@dataclass
class ScriptedReach:
    """Stands in for vmferry-reach. `fails`: the code of the next injected call's refusal."""

    calls: list[str] = field(default_factory=list)
    fails: int = 0
    kind: int = pb.MAPPING_KIND_MEMFD
    shared: bool = True

    async def call(self, process: Process, request: pb.ReachRequest) -> tuple[pb.ReachReply, list[int]]:
        del process
        name = request.WhichOneof("operation") or ""
        if name == "describe":
            return self._describe(request.describe)
        self.calls.append(name)
        if self.fails and name != "empty":
            code, self.fails = self.fails, 0
            raise ReachFailed(code, "thread 7 is traced by 9; end that debugger.")
        if name == "create_userfaultfd":
            reply = pb.CreateUserfaultfdReply(descriptor_in_process=UFFD)
            return pb.ReachReply(create_userfaultfd=reply), [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
        return pb.ReachReply(), []

    def _describe(self, request: pb.DescribeRequest) -> tuple[pb.ReachReply, list[int]]:
        opens = bool(request.open_backing)
        mappings = [
            pb.Mapping(
                start=one.start,
                size=one.size,
                kind=self.kind,  # type: ignore[arg-type]
                shared=self.shared,
                page_size=4096,
                path="/memfd:ram (deleted)",
                inode=1,
                offset=one.start - RAM_HVA,
                descriptor=0 if opens else None,
            )
            for one in request.ranges
        ]
        files = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)] if opens else []
        return pb.ReachReply(describe=pb.DescribeReply(mappings=mappings)), files


@dataclass
class ScriptedPager:
    """A pager's memory socket. `answer`: the frame for each message."""

    path: Path
    answer: dict[str, Any] = field(default_factory=lambda: {"type": "attached", "version": 1})
    messages: list[dict[str, Any]] = field(default_factory=list)

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._one, self.path)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.messages.append(json.loads(await reader.read(1 << 16)))
        body = json.dumps(self.answer).encode()
        writer.write(len(body).to_bytes(4, "big") + body)
        await writer.drain()
        writer.close()


def commands_of(transcript: Sequence[str]) -> list[str]:
    """Without the descriptors that come and go."""
    return [name for name in transcript if name not in ("add-fd", "remove-fd", "getfd", "announce-self")]
