"""The network of a stage: each host has a network namespace of its own, or both share loopback."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import secrets
import socket
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
PAGE_PORTS = 16
"""Ports for source pagers of one host."""
NETWORKS = ("10.213.77.1", "10.213.77.2")
"""An address inside the two namespaces. Nothing else is connected to them."""


@dataclass(frozen=True, slots=True)
class Place:
    """The addresses of one host. `netns` "": the network of this process."""

    ip: str
    netns: str
    api_port: int
    peer_port: int
    ops_port: int
    first_page_port: int

    @property
    def api(self) -> str:
        return f"{self.ip}:{self.api_port}"

    @property
    def peer(self) -> str:
        return f"{self.ip}:{self.peer_port}"

    @property
    def page_ports(self) -> tuple[int, int]:
        """Half-open."""
        return self.first_page_port, self.first_page_port + PAGE_PORTS


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def loopback_places(count: int = 2) -> list[Place]:
    """Ports that are free now, below the kernel's range for outgoing connections."""
    size = PAGE_PORTS + 3
    for _ in range(200):
        first = random.randrange(10_000, 32_000)  # not a secret
        if all(map(_is_free, range(first, first + size * count))):
            starts = range(first, first + size * count, size)
            return [Place("127.0.0.1", "", start, start + 1, start + 2, start + 3) for start in starts]
    raise OSError("no free run of ports on 127.0.0.1")


class NamespacePair:
    """Two network namespaces joined by a veth pair. `enter` takes this process into the first, which reaches both."""

    def __init__(self) -> None:
        tag = f"{os.getpid():x}{secrets.token_hex(2)}"
        self.names = (f"vmferry-{tag}-a", f"vmferry-{tag}-b")
        self._links = (f"vf{tag[-8:]}a", f"vf{tag[-8:]}b")
        self._home: int | None = None

    async def make(self) -> str:
        """Makes the namespaces. Returns "" or the reason of the failure, with nothing left behind."""
        first, second = self.names
        one, two = self._links
        steps = [
            f"ip netns add {first}",
            f"ip netns add {second}",
            f"ip link add {one} netns {first} type veth peer name {two} netns {second}",
        ]
        for name, link, ip in zip(self.names, self._links, NETWORKS, strict=True):
            steps += [
                f"ip -n {name} addr add {ip}/30 dev {link}",
                f"ip -n {name} link set lo up",
                f"ip -n {name} link set {link} up",
            ]
        for step in steps:
            why = await _run(step)
            if why:
                await self.remove()
                return f"{step}: {why}"
        return ""

    def places(self) -> tuple[Place, Place]:
        first, second = (Place(ip, name, 7600, 7601, 7680, 7700) for ip, name in zip(NETWORKS, self.names, strict=True))
        return first, second

    def enter(self) -> None:
        """Enters the first namespace. It must come before gRPC starts its threads, which inherit the namespace."""
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        target = os.open(f"/run/netns/{self.names[0]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(target)
        finally:
            os.close(target)

    async def cut(self) -> None:
        """Takes the link down, as if its cable were pulled."""
        await _run(f"ip -n {self.names[0]} link set {self._links[0]} down")

    async def remove(self) -> None:
        """Removes the names. A namespace itself ends with its last process."""
        if self._home is not None:
            _setns(self._home)
            os.close(self._home)
            self._home = None
        for name in self.names:
            await _run(f"ip netns del {name}")  # An error here means that the namespace was never made.


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


async def _run(command: str) -> str:
    """Runs a command. Returns "" or its complaint."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command.split(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        return str(error)
    _, complaint = await process.communicate()
    return "" if process.returncode == 0 else complaint.decode(errors="replace").strip() or "failed"
