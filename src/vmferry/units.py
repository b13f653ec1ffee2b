"""Addresses and sizes. Address types never mix, ranges are half-open, sizes are bytes."""

from __future__ import annotations

from typing import NewType

Gpa = NewType("Gpa", int)
"""Guest-physical address, bytes."""

Hva = NewType("Hva", int)
"""Host-virtual address in the VMM, bytes."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

PAGE_4K = 4 * KIB
PAGE_2M = 2 * MIB
PAGE_1G = GIB

PUSH_LIMIT_LEAST = PAGE_4K
PUSH_LIMIT_MOST = 1024 * GIB
"""The range of a push limit, bytes per second: from one page to 1 TiB."""

LSB_4K = 12
"""log2 of a 4 KiB page: `addr_lsb` of a machine check (Intel SDM vol. 3B, 17.3.2.4)."""
