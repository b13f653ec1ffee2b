"""The log: a stream that fails changes nothing, and tracebacks tell no secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import pytest
import structlog

from vmferry.daemon import log


@pytest.fixture(autouse=True)
def configuration() -> Iterator[None]:
    """What others log is as before."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(params=["disk full", "collector gone"])
def broken(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    if request.param == "disk full":
        stream: TextIO = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    else:
        reading, writing = os.pipe()
        os.close(reading)
        stream = os.fdopen(writing, "w")
    yield stream
    with suppress(OSError):
        stream.close()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_line_that_cannot_be_written_is_lost_and_raises_nothing(broken: TextIO, format_: str) -> None:
    log.configure(format_, "info", "host-a", broken)
    for _ in range(3):
        structlog.stdlib.get_logger().info("demo.event", filler="x" * 10_000)
        logging.getLogger("grpc").error("a library's words")


def test_a_stream_that_is_closed_loses_the_line() -> None:
    out = io.StringIO()
    out.close()
    stream = log.LossyStream(out)
    assert stream.write("words") == 5
    stream.flush()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_traceback_carries_no_local_variable(format_: str) -> None:
    out = io.StringIO()
    log.configure(format_, "info", "host-a", out)
    token = "token-of-a-lane"[::-1]
    try:
        int(token)
    except ValueError as error:
        error.args = ("not a number",)
        structlog.stdlib.get_logger().exception("demo.failed")
    assert "not a number" in out.getvalue()
    assert token not in out.getvalue()


def test_json_is_an_object_a_line() -> None:
    out = io.StringIO()
    log.configure("json", "info", "host-a", out)
    structlog.stdlib.get_logger().info("demo.event", vm="web")
    line = json.loads(out.getvalue())
    assert (line["event"], line["vm"], line["host"], line["level"]) == ("demo.event", "web", "host-a", "info")


def test_a_clock_that_cannot_be_read_costs_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def beyond() -> int:
        raise OverflowError("timestamp too large to convert to C _PyTime_t")

    monkeypatch.setattr(time, "time_ns", beyond)
    out = io.StringIO()
    log.configure("json", "info", "host-a", out)
    structlog.stdlib.get_logger().info("demo.event")
    assert json.loads(out.getvalue())["timestamp"].startswith("2262-")
