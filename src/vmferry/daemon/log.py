"""Structured logs on standard error: one event name a fact, identity bound once.

Values are bound under these names: `host`, `migration`, `vm`. Figures of single faults go to the metrics, not here.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

DAEMON_STARTING = "daemon.starting"
DAEMON_READY = "daemon.ready"
DAEMON_NOT_READY = "daemon.not_ready"
DAEMON_STOPPING = "daemon.stopping"
DAEMON_STOPPED = "daemon.stopped"
DAEMON_TASK_RETURNED = "daemon.task_returned"
DAEMON_FAILED = "daemon.failed"


def configure(format_: str, level: str, host: str, stream: TextIO | None = None) -> None:
    """Sets structlog up for the process and binds `host`. `format_` is "json" or "console"."""
    out = stream or sys.stderr
    numeric = logging.getLevelNamesMapping()[level.upper()]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(sort_keys=True)
        if format_ == "json"
        else structlog.dev.ConsoleRenderer(colors=out.isatty())
    )
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    tail: list[structlog.typing.Processor] = [structlog.processors.dict_tracebacks] if format_ == "json" else []
    structlog.configure(
        processors=[*shared, *tail, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.bind_contextvars(host=host)
    _route_stdlib(out, numeric, shared, [*tail, renderer])


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
