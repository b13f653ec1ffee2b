"""The ops endpoint over real HTTP on loopback, with a scripted state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from tests.support.scripted.ops import STATE, ScriptedReadiness, ScriptedSource
from vmferry.demo.patience import patient
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Phase
from vmferry.ops.server import OpsServer
from vmferry.ops.state import Check
from vmferry.units import Gpa


class Ops:
    def __init__(self, url: str, source: ScriptedSource, readiness: ScriptedReadiness) -> None:
        self.url, self.source, self.readiness = url, source, readiness
        self.session = aiohttp.ClientSession()

    async def get(self, path: str) -> tuple[int, str, dict[str, str]]:
        async with self.session.get(self.url + path) as answer:
            return answer.status, await answer.text(), dict(answer.headers)

    async def events(self, path: str) -> AsyncIterator[tuple[str, dict[str, object]]]:
        async with self.session.get(self.url + path) as answer:
            assert answer.content_type == "text/event-stream"
            name = ""
            async for line in answer.content:
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    name = text[7:]
                elif text.startswith("data: "):
                    yield name, json.loads(text[6:])


@pytest.fixture
async def ops() -> AsyncIterator[Ops]:
    source, readiness = ScriptedSource(), ScriptedReadiness()
    server = OpsServer(source, readiness, "1.2.3")
    port = await server.start("127.0.0.1", 0)
    task = asyncio.create_task(server.run())
    client = Ops(f"http://127.0.0.1:{port}", source, readiness)
    yield client
    await client.session.close()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await server.stop()


async def test_page_shows_everything_without_a_script(ops: Ops) -> None:
    status, text, headers = await ops.get("/")
    assert status == 200
    for word in (
        "web-1", "MIGRATING_OUT", "512 MiB", "POSTCOPY", "600 of 1000 pages", "91 µs", "4.2 ms", "12.0 ms",
        "0x1f000", "read", "AR", "yes", "host-b", "QUEUED", "2023-11-14 22:13:21.000",
    ):  # fmt: skip
        assert word in text, word
    assert '<progress max="1000" value="600">' in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "style=" not in text and "http://" not in text.replace("http-equiv", "")


async def test_text_from_outside_is_escaped(ops: Ops) -> None:
    hostile = replace(STATE.moving[0], reason="<script>alert(1)</script>")
    ops.source.value = replace(STATE, moving=(hostile,))
    _, text, _ = await ops.get("/")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


async def test_static_files_are_served(ops: Ops) -> None:
    for path in ("/static/dashboard.js", "/static/dashboard.css"):
        assert (await ops.get(path))[0] == 200


async def test_an_empty_daemon_has_a_page(ops: Ops) -> None:
    ops.source.value = replace(STATE, machines=(), moving=(), ledgers={}, events=())
    status, text, _ = await ops.get("/")
    assert (status, "No VMM is connected." in text) == (200, True)


async def test_state_is_one_json_document(ops: Ops) -> None:
    status, text, _ = await ops.get("/api/v1/state")
    document = json.loads(text)
    assert status == 200
    assert document["migrations"][0]["progress"]["first_touch"]["p99_us"] == 4200.0
    assert document["ledgers"][0]["errors"][0] == {
        "gpa": "0x1f000", "size_bytes": 4096, "origin": "read", "severity": "AR", "guest_visible": True, "hop": 2,
        "count": 3, "first_seen_us": 1_700_000_000_000_000, "last_seen_us": 1_700_000_001_000_000,
    }  # fmt: skip


async def test_events_send_each_change_and_nothing_twice(ops: Ops) -> None:
    events = ops.events("/api/v1/events?parts")
    name, first = await anext(events)
    assert (name, first["migrations"][0]["phase"]) == ("state", "POSTCOPY")  # type: ignore[index]
    name, parts = await anext(events)
    assert (name, sorted(parts)) == ("parts", ["errors", "events", "incoming", "machines", "migrations"])
    entry = LedgerEntry(gpa=Gpa(0x5000), origin=Origin.VMM)
    ops.source.value = replace(STATE, ledgers={"web-1": (*STATE.ledgers["web-1"], entry)})
    seen: dict[str, object] = {}
    async with asyncio.timeout(patient(30)):
        async for name, parts in events:
            if name == "parts" and "errors" in parts:
                seen = parts
                break
    assert "0x5000" in str(seen["errors"])
    assert "events" not in seen
    ops.source.phase(Phase.COMPLETED)
    async with asyncio.timeout(patient(30)):
        async for name, parts in events:
            if name == "parts" and "COMPLETED" in str(parts.get("migrations")):
                break
    await events.aclose()  # type: ignore[attr-defined]


async def test_a_state_that_cannot_be_read_is_said_and_recovers(ops: Ops) -> None:
    ops.source.value = RuntimeError("disk full")
    for path in ("/", "/api/v1/state", "/metrics"):
        status, text, _ = await ops.get(path)
        assert (status, "disk full" in text) == (503, True)
    ops.source.value = STATE
    assert (await ops.get("/"))[0] == 200


async def test_readiness_names_each_cause(ops: Ops) -> None:
    assert (await ops.get("/readyz"))[0] == 200
    ops.readiness.value = (
        Check("store", False, "/x is read-only"),
        Check("pager", False, "not found"),
        Check("api", True, ""),
    )
    status, text, _ = await ops.get("/readyz")
    assert status == 503
    assert json.loads(text)["causes"] == ["store: /x is read-only", "pager: not found"]


async def test_healthz_measures_the_loop(ops: Ops) -> None:
    status, text, _ = await ops.get("/healthz")
    body = json.loads(text)
    assert (status, body["ok"], body["causes"]) == (200, True, [])
    assert body["tasks"] >= 3


async def test_stop_ends_open_streams() -> None:
    server = OpsServer(ScriptedSource(), ScriptedReadiness(), "1")
    port = await server.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/api/v1/events") as answer:
        await answer.content.readline()
        async with asyncio.timeout(patient(30)):
            await server.stop()


async def test_a_client_that_speaks_no_http_is_one_line_in_the_log(ops: Ops, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = ops.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (await reader.read(64)).startswith(b"HTTP/1")
    writer.close()
    (record,) = [record for record in caplog.records if "it is no HTTP request" in record.getMessage()]
    assert record.levelname == "WARNING" and not record.exc_info
