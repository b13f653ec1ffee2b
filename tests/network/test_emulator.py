"""The network of the other tests does what it says, and twice the same."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from tests.support.network.emulator import ADDRESSES, CLEAN, Conditions, Emulator
from tests.support.network.namespaces import inside, two_namespaces

PORT = 9000
DATAGRAMS = 400
QUIET_S = 1.0
"""After the last datagram of those that still come."""


@dataclass
class Ends:
    """A datagram socket in each namespace."""

    emulator: Emulator
    a: socket.socket
    b: socket.socket

    def send(self, count: int = DATAGRAMS, size: int = 100) -> None:
        for number in range(count):
            self.a.sendto(number.to_bytes(4, "big") + bytes(size - 4), (ADDRESSES[1], PORT))

    def received(self, most: int = DATAGRAMS) -> list[int]:
        """Numbers in the order of their arrival: so many, or all that come."""
        return list(islice(_numbers(self.b), most))


def _numbers(end: socket.socket) -> Iterator[int]:
    end.settimeout(QUIET_S)
    while True:
        try:
            yield int.from_bytes(end.recv(2048)[:4], "big")
        except TimeoutError:
            return


@contextmanager
def ends(program: Path, seed: int = 1) -> Iterator[Ends]:
    with two_namespaces() as names:
        emulator = Emulator(program, names, seed)
        try:
            sockets = []
            for name, ip in zip(names, ADDRESSES, strict=True):
                with inside(name):
                    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                end.bind((ip, PORT))
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
                sockets.append(end)
            with sockets[0], sockets[1]:
                yield Ends(emulator, *sockets)
        finally:
            emulator.stop()


@pytest.fixture
def network(emulator_program: Path) -> Iterator[Ends]:
    with ends(emulator_program) as made:
        yield made


def test_a_clean_network_carries_all_in_order(network: Ends):
    network.send()
    assert network.received() == list(range(DATAGRAMS))


def test_a_delay_is_at_least_as_long_as_said(network: Ends):
    network.emulator.set(Conditions(delay_ms=60), "ab")
    began = time.monotonic()
    network.send(1)
    assert network.received(1) == [0]
    assert time.monotonic() - began >= 0.06


def test_losses_follow_from_the_seed(emulator_program: Path):
    def lost(seed: int) -> set[int]:
        with ends(emulator_program, seed) as network:
            network.emulator.set(Conditions(loss_percent=10))
            network.send()
            return set(range(DATAGRAMS)) - set(network.received())

    first = lost(1)
    assert DATAGRAMS * 0.03 < len(first) < DATAGRAMS * 0.2
    assert lost(1) == first
    assert lost(2) != first


def test_some_overtake_and_none_is_lost(network: Ends):
    network.emulator.set(Conditions(delay_ms=20, reorder_percent=10))
    network.send()
    arrived = network.received()
    assert sorted(arrived) == list(range(DATAGRAMS))
    assert arrived != sorted(arrived)


def test_jitter_keeps_the_order(network: Ends):
    network.emulator.set(Conditions(delay_ms=1, jitter_ms=10))
    network.send()
    assert network.received() == list(range(DATAGRAMS))


def test_a_bottleneck_lets_its_rate_through_and_drops_packets_beyond_its_queue(network: Ends):
    network.emulator.set(Conditions(rate_mbit=1, queue_ms=100), "ab")
    began = time.monotonic()
    network.send(size=1000)
    arrived = network.received()
    took = time.monotonic() - began - QUIET_S
    overflowed = network.emulator.stats()["ab_overflowed"]
    assert overflowed > 0
    assert len(arrived) == DATAGRAMS - overflowed
    assert arrived == sorted(arrived)
    assert sum(1028 * 8 for _ in arrived[1:]) / took <= 1.1e6


@pytest.mark.parametrize("direction", ["ab", "ba", "both"])
def test_a_hole_swallows_its_direction_alone_until_it_is_closed(network: Ends, direction: str):
    network.emulator.set(Conditions(hole=True), direction)
    network.a.sendto(b"aaaa", (ADDRESSES[1], PORT))
    network.b.sendto(b"bbbb", (ADDRESSES[0], PORT))
    assert bool(list(_numbers(network.b))) == (direction == "ba")
    assert bool(list(_numbers(network.a))) == (direction == "ab")
    network.emulator.set(CLEAN)
    network.send(1)
    assert network.received(1) == [0]


def test_packets_over_the_largest_vanish_without_a_word(network: Ends):
    network.emulator.set(Conditions(largest=1400))
    network.send(1, size=1400)
    network.send(1, size=1300)
    assert network.received(1) == [0]
    assert network.emulator.stats()["ab_lost"] == 1
