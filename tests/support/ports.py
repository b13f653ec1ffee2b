"""TCP ports for daemons of a test."""

from __future__ import annotations

import os
import socket


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, below the range the kernel gives out; far from those of the next process."""
    found: list[int] = []
    for port in range(20000 + os.getpid() * 64 % 8192, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
