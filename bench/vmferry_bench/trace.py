"""QEMU's own words about its faults, out of its trace log: pure.

With `-msg timestamp=on` a line of the backend `log` is `PID@SECONDS.MICROSECONDS:EVENT WORDS`. The fault thread writes
`postcopy_ram_fault_thread_request` once it has read a fault from its userfaultfd, and the thread that installs a page
writes `postcopy_place_page` after the ioctl. vmferry's pager measures between the same two moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EVENTS = ("postcopy_ram_fault_thread_request", "postcopy_place_page", "postcopy_place_page_zero")
PAGE = 4096
_LINE = re.compile(r"\d+@(\d+)\.(\d+):(\w+) .*?(?:HVA|host)=0x([0-9a-f]+)")


def waits_us(lines: Iterable[str]) -> list[float]:
    """Read to installed, of every page that was asked for and came afterwards. A page that came before the request was
    written down, or that was asked for again, counts once or not at all."""
    asked: dict[int, int] = {}
    waits: list[float] = []
    for line in lines:
        if (found := _LINE.match(line)) is None or found[3] not in EVENTS:
            continue
        at, page = int(found[1]) * 1_000_000 + int(found[2]), int(found[4], 16) // PAGE
        if found[3] == EVENTS[0]:
            asked.setdefault(page, at)
        elif page in asked:
            waits.append(float(at - asked.pop(page)))
    return waits
