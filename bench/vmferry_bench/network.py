"""The network that a run is made in: both sides' connections are paced in the same way there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from vmferry.daemon.config import DEFAULT_CONGESTION_CONTROL
from vmferry.demo.network import CLONE_NEWNET

CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
SIOCSIFFLAGS = 0x8914
"""netdevice(7)."""
IFF_UP = 1


def congestion_control() -> str:
    """Of connections for which nobody says another: those of QEMU and of the floor."""
    return CONGESTION_CONTROL.read_text().strip()


def enter_own_network() -> str:
    """Takes this process, and all that it starts, into a network namespace that has nothing but loopback, where
    connections are paced as vmferry's lanes are. To be called before there is a second thread.

    Returns "", or why connections are paced as this host does it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        return f"a network namespace: {os.strerror(ctypes.get_errno())}"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    try:
        CONGESTION_CONTROL.write_text(DEFAULT_CONGESTION_CONTROL)
    except OSError as error:
        return f"{CONGESTION_CONTROL}: {error.strerror}"
    return ""
