"""The audit log: a line of JSON for each call that may change something, and for each that was refused.

`at` (Unix seconds), `port`, `who`, `from`, `call`, `on` (fields of the request), `outcome` (a gRPC code).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.stdlib.get_logger()

LOST = "audit.line_lost"
SIZE_LIMIT = 64 << 20
"""A longer file is renamed to `.1`, and the former `.1` is gone."""


class AuditLog:
    """Owner of the file. If a line cannot be written, the daemon's log has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def note(self, record: Mapping[str, object]) -> None:
        line = json.dumps({"at": round(time.time(), 3), **record}, ensure_ascii=True) + "\n"
        try:
            os.write(self._file(), line.encode())
        except OSError:
            log.exception(LOST, line=line)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _file(self) -> int:
        if self._fd >= 0 and os.fstat(self._fd).st_size > SIZE_LIMIT:
            self.close()
            with suppress(FileNotFoundError):
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return self._fd
