"""The network of a Linux guest: datagram sockets that carry Ethernet frames. The test is the other host on the wire."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from pathlib import Path

from tests.support.linux_guest.image import ADDRESS
from vmferry.demo.patience import patient

GUEST_MAC = bytes.fromhex("525400abcdef")
OWN_MAC = bytes.fromhex("525400000001")
OWN_ADDRESS = "10.77.0.1"
ARP, RARP, IPV4 = 0x0806, 0x8035, 0x0800
ECHO_REPLY, ECHO = 0, 8
ICMP = 1
PING_EVERY_S = 0.2
ANSWER_S = patient(60.0)


class Wire:
    """Owner of the socket. Each QEMU has a socket of its own, so that a frame tells the QEMU that sent it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "wire"
        self.announcements: Counter[str] = Counter()
        """RARP frames by the name of the QEMU that sent them."""
        self._answers: set[tuple[str, int]] = set()
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        asyncio.get_running_loop().add_reader(self._socket, self._take)

    def place(self, qemu: str) -> Path:
        return self.path.with_name(f"{qemu}.net")

    def options(self, qemu: str) -> list[str]:
        """A virtio-net on this wire."""
        here = f"local.type=unix,local.path={self.place(qemu)},remote.type=unix,remote.path={self.path}"
        return [
            *("-netdev", f"dgram,id=net,{here}"),
            *("-device", f"virtio-net-pci,netdev=net,romfile=,mac={GUEST_MAC.hex(':')}"),
        ]

    async def ping(self, qemu: str) -> None:
        """Returns once the guest has answered through this QEMU. Raises: TimeoutError."""
        async with asyncio.timeout(ANSWER_S):
            first = self._number + 1
            while not any(who == qemu and number >= first for who, number in self._answers):
                self._number += 1
                self._send(qemu, GUEST_MAC, IPV4, _echo(self._number))
                await asyncio.sleep(PING_EVERY_S)

    async def announced(self, qemu: str, more_than: int) -> None:
        """Raises: TimeoutError."""
        async with asyncio.timeout(ANSWER_S):
            while self.announcements[qemu] <= more_than:  # noqa: ASYNC110 frames come by a callback
                await asyncio.sleep(PING_EVERY_S)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _take(self) -> None:
        frame, sender = self._socket.recvfrom(1 << 16)
        qemu = Path(sender or "").stem
        (kind,) = struct.unpack_from(">H", frame, 12)
        if kind == RARP:
            self.announcements[qemu] += 1
        elif kind == ARP and frame[38:42] == socket.inet_aton(OWN_ADDRESS):
            answer = struct.pack(">HHBBH", 1, IPV4, 6, 4, 2) + OWN_MAC + socket.inet_aton(OWN_ADDRESS) + frame[22:32]
            self._send(qemu, frame[6:12], ARP, answer)
        elif kind == IPV4 and frame[23] == ICMP and frame[34] == ECHO_REPLY:
            self._answers.add((qemu, struct.unpack_from(">H", frame, 40)[0]))

    def _send(self, qemu: str, to: bytes, kind: int, payload: bytes) -> None:
        try:
            self._socket.sendto(to + OWN_MAC + struct.pack(">H", kind) + payload, str(self.place(qemu)))
        except OSError:
            return  # its QEMU does not listen: as a cable that leads nowhere


def _echo(number: int) -> bytes:
    icmp = _with_sum(struct.pack(">BBHHH", ECHO, 0, 0, 1, number) + struct.pack(">d", time.monotonic()), 2)
    addresses = socket.inet_aton(OWN_ADDRESS) + socket.inet_aton(ADDRESS)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(icmp), number, 0, 64, ICMP, 0) + addresses
    return _with_sum(head, 10) + icmp


def _with_sum(data: bytes, at: int) -> bytes:
    """Puts in the Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + struct.pack(">H", ~total & 0xFFFF) + data[at + 2 :]
