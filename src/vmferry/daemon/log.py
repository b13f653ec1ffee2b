"""Structured logs on standard error: one event name a fact, identity bound once.

Values are bound under these names: `host`, `migration`, `vm`. Figures of single faults go to the metrics, not here.

A line that cannot be written is lost, and nothing else changes: a full disk or a log collector that died must not end a
migration. Tracebacks carry no local variables: these may hold lane tokens.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog

from vmferry.aio.wall_clock import iso_utc, now_us

DAEMON_STARTING = "daemon.starting"
DAEMON_READY = "daemon.ready"
DAEMON_NOT_READY = "daemon.not_ready"
DAEMON_STOPPING = "daemon.stopping"
DAEMON_STOPPED = "daemon.stopped"
DAEMON_TASK_RETURNED = "daemon.task_returned"
DAEMON_FAILED = "daemon.failed"
DAEMON_HANGUP_IGNORED = "daemon.hangup_ignored"


class LossyStream:
    """A text stream whose writes never fail: a line that the file cannot take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure(format_: str, level: str, host: str, stream: TextIO | None = None) -> None:
    """Sets structlog up for the process and binds `host`. `format_` is "json" or "console"."""
    terminal = stream or sys.stderr
    out = cast(TextIO, LossyStream(terminal))
    numeric = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(sort_keys=True)
        if format_ == "json"
        else structlog.dev.ConsoleRenderer(colors=terminal.isatty(), exception_formatter=structlog.dev.plain_traceback)
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _stamp,
    ]
    tracebacks = structlog.processors.ExceptionRenderer(
        structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    )
    tail: list[structlog.typing.Processor] = [tracebacks] if format_ == "json" else []
    structlog.configure(
        processors=[*shared, *tail, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(host=host)
    _route_stdlib(out, numeric, shared, [*tail, renderer])


def _stamp(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["timestamp"] = iso_utc(now_us())
    return event


def _route_stdlib(
    out: TextIO,
    level: int,
    shared: list[structlog.typing.Processor],
    tail: list[structlog.typing.Processor],
) -> None:
    """Libraries (grpc, aiohttp, asyncio) log through the standard module: the same lines, at warning and above."""
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
