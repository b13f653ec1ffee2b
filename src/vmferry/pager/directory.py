"""The directory of one pager below `runtime_dir`. The paths of its sockets fit into an address of unix(7)."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from vmferry.errors import Reason, VmferryError
from vmferry.model.names import SOCKET_PATH_LIMIT

VMS = "vms"
CONTROL_SOCKET = "pager.sock"
MEMORY_SOCKET = "memory.sock"

_DIGEST = 12
"""Characters of a digest: 60 bits."""
RUNTIME_DIR_LIMIT = SOCKET_PATH_LIMIT - len(f"/{VMS}/") - _DIGEST - len(f"/{MEMORY_SOCKET}")
"""The most bytes of a `runtime_dir` with room for any pager."""


def directory_of(runtime_dir: Path, key: str) -> Path:
    """The directory of the pager `key`: its name is the key, or as much of it as fits and a digest of it.

    Raises: VmferryError INVALID_ARGUMENT: `runtime_dir` is longer than its limit.
    """
    length = len(os.fsencode(runtime_dir))
    if length > RUNTIME_DIR_LIMIT:
        raise VmferryError(
            Reason.INVALID_ARGUMENT,
            f"runtime_dir {runtime_dir} has {length} bytes, at most {RUNTIME_DIR_LIMIT} leave room for unix sockets.",
            "Choose a shorter runtime_dir.",
        )
    root = runtime_dir / VMS
    room = SOCKET_PATH_LIMIT - length - len(f"/{VMS}/") - len(f"/{MEMORY_SOCKET}")
    if len(key) <= room:
        return root / key
    digest = base64.b32encode(hashlib.sha256(key.encode()).digest()).decode()[:_DIGEST].lower()
    start = key[: max(0, room - _DIGEST - 1)]
    return root / (f"{start}-{digest}" if start else digest)
