"""Real daemons and real reference VMMs on this machine, for the demo and the scenario tests.

A stage has a directory of its own below /tmp, because unix socket paths must stay short. At its end, however it comes,
the stage ends everything that it started: guests first, then daemons, then pagers, which outlive their daemons.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

from vmferry.client.api import Api, open_api
from vmferry.client.refusal import ApiError
from vmferry.demo.admin import Admin, AdminError, GuestAdmin
from vmferry.demo.network import Place
from vmferry.demo.options import GuestShape, WaitingShape
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process, end_processes_of, to_the_end
from vmferry.demo.programs import daemon_command, find_program
from vmferry.errors import Reason, VmferryError
from vmferry.security.names import DEFAULT_DOMAIN, host_id
from vmferry.security.pki import Authority
from vmferry.units import MIB
from vmferry.v1 import machines_pb2

START_S = patient(30.0)
"""The wait for a daemon or a guest: migrations of the database, first contents of the guest's memory."""
ANSWER_S = patient(10.0)
LOOK_S = patient(2.0)
END_S = patient(2.0)
TIME_OUTS_S = {
    "timeouts": {
        "downtime_s": 1.0,
        "stop_s": 60.0,
        "vmm_s": 10.0,
        "attach_s": 10.0,
        "pager_s": 10.0,
        "peer_s": 10.0,
    },
    "pages": {"demand_timeout_s": 10.0},
}
"""The daemon's own default time-outs by section and key, for machines of normal speed."""
TLS = os.environ.get("VMFERRY_STAGE_TLS", "") not in ("", "0")
"""Whether the hosts of a stage speak TLS, where its maker does not say."""
LONGEST_S = 600.0
"""The range that the configuration permits for each time-out."""


class StageError(VmferryError):
    """A part of the stage did not come up, or ended."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(Reason.INTERNAL, message, remedy)


async def until(what: str, condition: Callable[[], Awaitable[bool]], within_s: float = START_S) -> None:
    """Polls a condition until it holds.

    Raises:
        StageError: names the condition `what`.
    """
    end = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > end:
            raise StageError(f"waited {within_s:g} s for {what}")
        await asyncio.sleep(0.02)


def _with_durations(lines: str, defaults: Mapping[str, float]) -> str:
    """The section's lines with a longer time-out for each duration that has a default, within the permitted range."""
    rows = dict(line.split(" = ", 1) for line in lines.splitlines())
    for key, seconds in defaults.items():
        rows[key] = f"{min(patient(float(rows.get(key, seconds))), LONGEST_S):g}"
    return "\n".join(f"{key} = {value}" for key, value in rows.items())


class Host:
    """A daemon with its own directories, configuration and addresses."""

    def __init__(self, name: str, place: Place, root: Path, authority: Authority | None = None) -> None:
        """Without an authority its connections are plain."""
        self.name = name
        self.place = place
        self.directory = root / name
        self.vmm_socket = self.directory / "run" / "vmm.sock"
        self.process: Process | None = None
        self._root = root
        self.tls = 'mode = "off"'
        """The lines of [tls]."""
        self.caller: Mapping[str, str] = {}
        """The environment of a caller of its API: the certificate (`client/certificate.py`)."""
        if authority is not None:
            self._certify(authority)

    def _certify(self, authority: Authority) -> None:
        files = authority.issue(self.name, host_id(DEFAULT_DOMAIN, self.name), [self.place.ip, "127.0.0.1"])
        user = authority.issue("operator", f"spiffe://{DEFAULT_DOMAIN}/vmferry/user/operator")
        named = {"cert": files.cert, "key": files.key, "ca": files.ca, "crl": files.crl}
        self.tls = "\n".join(f"{key} = {json.dumps(str(path))}" for key, path in named.items())
        self.caller = {
            "VMFERRY_CERT": str(user.cert),
            "VMFERRY_KEY": str(user.key),
            "VMFERRY_CA": str(user.ca),
            "VMFERRY_CRL": str(user.crl),
        }

    def write_config(self, **extra: str) -> Path:
        """The daemon's TOML file. `extra` are lines by section, placed before the lines made here."""
        for part in ("run", "state"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)
        first, last = self.place.page_ports
        sections = {
            "vmm": f"socket = {json.dumps(str(self.vmm_socket))}",
            "api": f'listen = "{self.place.api}"',
            "peer": f'listen = "{self.place.peer}"',
            "pages": f'ip = "{self.place.ip}"\nports = [{first}, {last}]',
            "ops": f'listen = "127.0.0.1:{self.place.ops_port}"',
            "pager": f"program = {json.dumps(str(find_program('vmferry-pager')))}",
            "log": 'format = "json"\nlevel = "info"',
            "tls": self.tls,
            "access": f'admin = ["spiffe://{DEFAULT_DOMAIN}/vmferry/user/operator"]',
        }
        for section, lines in extra.items():
            kept = [line for line in sections.get(section, "").splitlines() if line.split(" =")[0] + " =" not in lines]
            sections[section] = "\n".join([*kept, lines])
        for section, durations in TIME_OUTS_S.items():
            sections[section] = _with_durations(sections.get(section, ""), durations)
        head = f'host = "{self.name}"\nruntime_dir = "{self.directory}/run"\nstate_dir = "{self.directory}/state"\n'
        body = "".join(f"\n[{section}]\n{lines}\n" for section, lines in sections.items())
        path = self.directory / "vmferryd.toml"
        path.write_text(head + body)
        return path

    async def start(self) -> None:
        """Starts the daemon and waits until its API answers. It may be called again."""
        config = self.directory / "vmferryd.toml"
        if not config.exists():
            self.write_config()
        log = self._root / f"{self.name}.daemon.log"
        argv = [*daemon_command(), "--config", str(config)]
        self.process = await Process.start(f"{self.name} daemon", argv, log, self.place.netns)
        async with open_api(self.place.api, LOOK_S, self.caller) as api:
            await until(f"the API of {self.name}", lambda: self._answers(api))

    async def _answers(self, api: Api) -> bool:
        if self.process is None or not self.process.alive:
            words = self.process.last_words() if self.process else ""
            raise StageError(f"the daemon of {self.name} ended:\n{words}")
        try:
            async for _ in api.list_machines():
                break
        except ApiError:
            return False
        return True

    async def kill(self) -> None:
        """Ends the daemon with SIGKILL, as a crash would."""
        if self.process is not None:
            await self.process.kill()


class AnyGuest(Protocol):
    """A VMM of any kind, with the way to its guest."""

    @property
    def vm(self) -> str: ...

    @property
    def host(self) -> Host: ...

    @property
    def process(self) -> Process: ...

    @property
    def admin(self) -> GuestAdmin: ...


class Guest:
    """A reference VMM, with its admin connection."""

    def __init__(self, vm: str, host: Host, process: Process, admin: Admin) -> None:
        self.vm = vm
        self.host = host
        self.process = process
        self.admin = admin


class Stage:
    """Owner of the directory, the processes and the connections. Use it with `async with`."""

    def __init__(self, keep: bool = False, tls: bool = TLS) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vmferry-", dir="/tmp"))  # The path must stay short.
        self.authority = Authority.init(self.root / "pki") if tls else None
        self.hosts: list[Host] = []
        self.guests: list[AnyGuest] = []
        self.kept = keep
        self._guests_made = 0
        self._connections = AsyncExitStack()

    async def __aenter__(self) -> Stage:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await to_the_end(self._end(failed=kind is not None))

    async def _end(self, failed: bool) -> None:
        await self._connections.aclose()
        await self.dismiss_guests()
        await asyncio.gather(*(host.process.stop(END_S) for host in self.hosts if host.process is not None))
        await end_processes_of(self.root)
        self.kept = self.kept or failed
        if not self.kept:
            shutil.rmtree(self.root, ignore_errors=True)

    async def host(self, name: str, place: Place, **config: str) -> Host:
        """Adds a host and starts its daemon."""
        host = Host(name, place, self.root, self.authority)
        self.hosts.append(host)
        host.write_config(**config)
        await host.start()
        return host

    async def api(self, host: Host, timeout_s: float = ANSWER_S) -> Api:
        """A connection to a host's API that lives as long as the stage."""
        return await self._connections.enter_async_context(open_api(host.place.api, timeout_s, host.caller))

    async def guest(
        self, vm: str, host: Host, accel: str, shape: GuestShape | WaitingShape | None, options: Sequence[str] = ()
    ) -> Guest:
        """Starts a reference VMM on the host and returns when the daemon knows it.

        It runs a guest, or it waits to be a destination; with None it makes memory as the source's is. `options` are
        further options of the program.
        """
        role = "running" if isinstance(shape, GuestShape) else "incoming"
        self._guests_made += 1
        number = self._guests_made
        admin = self.root / f"{host.name}.{number}.admin"
        argv = [str(find_program("vmferry-refvm")), "--vm", vm, "--accel", accel]
        argv += ["--daemon", str(host.vmm_socket), "--admin", str(admin)]
        argv += guest_arguments(shape) if isinstance(shape, GuestShape) else waiting_arguments(shape)
        argv += options
        log = self.root / f"{host.name}.{number}.refvm.log"
        process = await Process.start(f"{host.name} refvm", argv, log, host.place.netns)
        guest = Guest(vm, host, process, Admin(admin))
        await self.add(guest, role)
        return guest

    async def add(self, guest: AnyGuest, role: str) -> None:
        """Takes a guest over, which ends with the stage, and waits until its daemon knows it as "running" or
        "incoming".
        """
        self.guests.append(guest)
        wanted = {"incoming": machines_pb2.MACHINE_STATE_INCOMING, "running": machines_pb2.MACHINE_STATE_RUNNING}[role]
        async with open_api(guest.host.place.api, LOOK_S, guest.host.caller) as api:
            await until(f"{guest.vm} {role} on {guest.host.name}", lambda: self._is_known(api, guest, wanted))

    async def _is_known(self, api: Api, guest: AnyGuest, state: int) -> bool:
        if not guest.process.alive:
            raise StageError(f"{guest.process.name} ended:\n{guest.process.last_words()}")
        try:
            machine = await api.machine(guest.vm)
        except ApiError:
            return False
        return bool(machine.state == state)

    async def dismiss_guests(self) -> None:
        """Ends every guest of the stage. Their pagers end with them."""
        guests, self.guests = self.guests, []
        for guest in guests:
            await guest.admin.close()
            await guest.process.kill()

    async def warm(self, guest: AnyGuest, passes: int = 1, within_s: float = START_S) -> None:
        """Waits until the guest has passed through all of its memory."""

        async def done() -> bool:
            try:
                report = await guest.admin.report()
            except AdminError:
                if not guest.process.alive:
                    raise
                return False
            return report.passes >= passes

        await until(f"{guest.vm} to go through its memory", done, within_s)


def guest_arguments(shape: GuestShape) -> list[str]:
    """The command line of a reference VMM that runs a guest of this shape."""
    return [
        *("--memory", f"{shape.memory // MIB}M"),
        *("--backing", shape.backing),
        *("--page-size", str(shape.page_size)),
        *("--vcpus", str(shape.vcpus)),
        *("--workload", shape.workload),
        *("--write-percent", str(shape.write_percent)),
        *("--seed", str(shape.seed)),
    ]


def waiting_arguments(shape: WaitingShape | None) -> list[str]:
    """The command line of a reference VMM that waits to be a destination."""
    words = ["--incoming"]
    if shape is not None and shape.backing is not None:
        words += ["--backing", shape.backing]
    if shape is not None and shape.page_size is not None:
        words += ["--page-size", str(shape.page_size)]
    return words
