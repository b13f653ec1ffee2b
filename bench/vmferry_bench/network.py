"""The network that a run is made in: both sides' connections are paced in the same way there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmferry.demo.network import CLONE_NEWNET

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
"""Only these can be chosen in another namespace than the first (`TCP_CONG_NON_RESTRICTED`, net/ipv4/tcp_cong.c)."""
LANE_CONGESTION_CONTROL = "cubic"
"""The pager's default, which a test compares."""
SIOCSIFFLAGS = 0x8914
"""netdevice(7)."""
IFF_UP = 1


def congestion_control() -> str:
    """The congestion control of connections that choose none: those of QEMU and of the floor."""
    return CONGESTION_CONTROL.read_text().strip()


def enter_own_network() -> str:
    """Takes this process, and all that it starts, into a network namespace that has nothing but loopback, where
    connections are paced as vmferry's lanes are. To be called before there is a second thread.

    Returns "", or why connections are paced as this host does it.
    """
    try:
        with _allowed(LANE_CONGESTION_CONTROL):
            _enter()
            CONGESTION_CONTROL.write_text(LANE_CONGESTION_CONTROL)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def _enter() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "a network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


@contextmanager
def _allowed(name: str) -> Iterator[None]:
    """Has the host allow a congestion control for a moment, if it does not. The open file stays that of this
    namespace, after the process has entered another as well."""
    before = ALLOWED.read_text().split()
    if name in before or os.geteuid() != 0:
        yield
        return
    with ALLOWED.open("w", buffering=1) as file:
        print(*before, name, file=file)
        try:
            yield
        finally:
            file.seek(0)
            print(*before, file=file)
