"""Keeps the host's CPUs out of idle states during a blackout: `ports.Processors`.

It uses the PM QoS request of a process: while the process holds /dev/cpu_dma_latency open with 0 in it, idle CPUs poll
(Documentation/power/pm_qos_interface.rst, Linux). The request ends with the process.
"""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

import structlog

log = structlog.get_logger()

LATENCY_FILE = Path("/dev/cpu_dma_latency")
NONE_US = struct.pack("i", 0)
AT_MOST_S = 1.0
"""The longest request. It is about a hundred blackouts, so a longer one is stuck."""
NOT_KEPT_AWAKE = "processors.not_kept_awake"


class HostProcessors:
    """The requests of this process. Use it in the event loop."""

    def __init__(self, latency_file: Path = LATENCY_FILE, at_most_s: float = AT_MOST_S) -> None:
        self._file = latency_file
        self._at_most_s = at_most_s
        self._held: dict[str, asyncio.TimerHandle] = {}
        self._request: int | None = None
        self._refused = False

    def keep_awake(self, who: str) -> None:
        if who in self._held:
            self._held[who].cancel()
        self._held[who] = asyncio.get_running_loop().call_later(self._at_most_s, self.let_sleep, who)
        if self._request is None:
            self._request = self._open()

    def let_sleep(self, who: str) -> None:
        timer = self._held.pop(who, None)
        if timer is not None:
            timer.cancel()
        if self._request is not None and not self._held:
            os.close(self._request)
            self._request = None

    def _open(self) -> int | None:
        """Opens the request. None: the process may not, or the file is missing; the first time this is logged."""
        try:
            request = os.open(self._file, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            if not self._refused:
                log.info(NOT_KEPT_AWAKE, error=str(error))
            self._refused = True
            return None
        try:
            os.write(request, NONE_US)
        except OSError as error:
            os.close(request)
            log.warning(NOT_KEPT_AWAKE, error=str(error))
            return None
        return request
