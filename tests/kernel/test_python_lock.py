"""Why no Python process maps registered guest memory and touches it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys

import pytest

from vmferry.demo.patience import patient

pytestmark = pytest.mark.usefixtures("uffd_poison")

DEADLINE_S = patient(60)
UFFDIO_ZEROPAGE = 0xC020AA04

CHILD = """
import ctypes, fcntl, mmap, os, socket, struct, sys, threading, time

UFFDIO_API, UFFDIO_REGISTER, MISSING = 0xC018AA3F, 0xC020AA00, 1
channel = socket.socket(fileno=int(sys.argv[1]))
uffd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
fcntl.ioctl(uffd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(uffd, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", address, 4096, MISSING, 0)))

def tick():
    while True:
        channel.send(b"tick")
        time.sleep(0.02)

threading.Thread(target=tick, daemon=True).start()
time.sleep(0.2)
socket.send_fds(channel, [struct.pack("=Q", address)], [uffd])
value = memory[0]  # the fault waits in the kernel, the lock is held
channel.send(b"read %d" % value)
"""


def test_touch_of_a_missing_page_stops_every_python_thread_until_it_comes() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    command = [sys.executable, "-c", CHILD, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as child:
        theirs.close()
        try:
            address, uffd = _receive_uffd(ours)
            os.set_blocking(uffd, True)
            message = os.read(uffd, 32)  # the touch happened
            assert struct.unpack_from("=Q", message, 16)[0] & -4096 == address
            _drain_until_silent(ours)
            fcntl.ioctl(uffd, UFFDIO_ZEROPAGE, bytearray(struct.pack("=QQQQ", address, 4096, 0, 0)))
            os.close(uffd)
            heard = []
            while b"read 0" not in heard:
                heard.append(ours.recv(64))
        finally:
            child.kill()


def _receive_uffd(channel: socket.socket) -> tuple[int, int]:
    while True:
        body, descriptors, _, _ = socket.recv_fds(channel, 64, 1)
        if descriptors:
            return struct.unpack("=Q", body)[0], descriptors[0]


def _drain_until_silent(channel: socket.socket) -> None:
    """Returns once a thread that ticks every 20 ms has been silent for a second; fails if it never is."""
    channel.settimeout(1)
    try:
        for _ in range(int(DEADLINE_S / 0.02)):
            channel.recv(64)
    except TimeoutError:
        return
    finally:
        channel.settimeout(DEADLINE_S)
    pytest.fail("the other thread went on while the page was missing")
