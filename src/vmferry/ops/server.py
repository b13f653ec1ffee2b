"""The aiohttp application: /, /healthz, /readyz, /metrics, and /api/v1: state, problems, events.

It changes nothing: every route is a GET. The page may load only from its own origin (CSP header).
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing
from pathlib import Path

from aiohttp import http_exceptions, web

from vmferry.model.vocabulary import Weight
from vmferry.ops.document import Document, problem_document
from vmferry.ops.health import Pulse
from vmferry.ops.metrics import Metrics
from vmferry.ops.page import Page
from vmferry.ops.rpc_metrics import RpcMetrics
from vmferry.ops.sampler import Sampler
from vmferry.ops.state import Readiness, StateSource

STATIC = Path(__file__).parent / "static"
HEARTBEAT_S = 10.0
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def _plainly(record: logging.LogRecord) -> bool:
    """Logs a client that does not speak HTTP in one line without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, http_exceptions.HttpProcessingError):
        record.exc_info = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = f"{record.getMessage()}: it is no HTTP request"
        record.args = ()
    return True


_LOG = logging.getLogger("vmferry.ops.http")
_LOG.addFilter(_plainly)


class OpsServer:
    """Serves on one address. `run` is the task that keeps its figures fresh."""

    def __init__(self, source: StateSource, readiness: Readiness, version: str, rpcs: RpcMetrics | None = None) -> None:
        self._source = source
        self._sampler = Sampler(source, version)
        self._readiness = readiness
        self._pulse = Pulse()
        self._metrics = Metrics(version, rpcs)
        self._rendering = asyncio.Lock()
        self._page = Page()
        self._streams: set[asyncio.Task[object]] = set()
        self._runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=2.0, logger=_LOG)

    def _app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/", self._dashboard),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics_text),
                web.get("/api/v1/state", self._state),
                web.get("/api/v1/problems", self._problems),
                web.get("/api/v1/events", self._events),
                web.static("/static", STATIC),
            ]
        )
        app.on_response_prepare.append(_add_headers)
        app.on_shutdown.append(self._end_streams)
        return app

    async def start(self, host: str, port: int) -> int:
        """Listens and returns the port. Raises: OSError."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        bound: int = self._runner.addresses[0][1]
        return bound

    async def run(self) -> None:
        """Refreshes the figures. It never returns."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pulse.run(), name="ops-pulse")
            group.create_task(self._sampler.run(), name="ops-sampler")

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _dashboard(self, _request: web.Request) -> web.Response:
        try:
            _, document = await self._sampler.sample()
        except Exception as error:  # noqa: BLE001 - the page says what is wrong instead of not coming
            return web.Response(text=f"vmferryd cannot read its state: {error}\n", status=503)
        html = await asyncio.to_thread(self._page.html, document, self._sampler.error)
        return _compressed(web.Response(text=html, content_type="text/html"))

    async def _healthz(self, _request: web.Request) -> web.Response:
        health = self._pulse.health()
        body = {"ok": health.ok, "loop_lag_s": health.loop_lag_s, "tasks": health.tasks, "causes": health.causes}
        return web.json_response(body, status=200 if health.ok else 503)

    async def _readyz(self, _request: web.Request) -> web.Response:
        checks = await self._readiness.checks()
        ok = all(check.ok for check in checks)
        body = {
            "ok": ok,
            "causes": [f"{check.name}: {check.detail}" for check in checks if not check.ok],
            "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in checks],
        }
        return web.json_response(body, status=200 if ok else 503)

    async def _metrics_text(self, request: web.Request) -> web.Response:
        try:
            state, _ = await self._sampler.sample()
        except Exception as error:  # noqa: BLE001 - a scrape without figures would look like a host without VMs
            return web.Response(text=f"# the state cannot be read: {error}\n", status=503)
        ready = not any(problem.weight is Weight.HOST for problem in state.problems)
        accept = request.headers.get("Accept", "")
        async with self._rendering:  # The registry is one: two readers in two threads would share its figures.
            body, content_type = await asyncio.to_thread(self._metrics.text, state, self._pulse.lag_s, ready, accept)
        return _compressed(web.Response(body=body, headers={"Content-Type": content_type}))

    async def _state(self, _request: web.Request) -> web.Response:
        try:
            _, document = await self._sampler.sample()
        except Exception as error:  # noqa: BLE001
            return web.json_response({"error": str(error) or repr(error)}, status=503)
        text = await asyncio.to_thread(json.dumps, document)
        return _compressed(web.Response(text=text, content_type="application/json"))

    async def _problems(self, _request: web.Request) -> web.Response:
        """The problems, the worst first. The status is 200 with or without any."""
        try:
            found = await self._source.problems()
        except Exception as error:  # noqa: BLE001
            return web.json_response({"error": str(error) or repr(error)}, status=503)
        return _compressed(web.json_response({"problems": [problem_document(one) for one in found]}))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: `state` (the document of /api/v1/state), and with `?parts` the page's changed `parts`."""
        with_parts = "parts" in request.query
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        task = asyncio.current_task()
        if task is not None:
            self._streams.add(task)
        shown: dict[str, str] = {}
        try:
            async with aclosing(self._sampler.documents(HEARTBEAT_S)) as documents:
                async for document in documents:
                    parts = self._page.parts(document) if with_parts and document is not None else {}
                    changed = {name: html for name, html in parts.items() if shown.get(name) != html}
                    shown |= changed
                    await response.write(_frames(document, changed))
        except ConnectionResetError:
            pass  # The reader has gone.
        finally:
            if task is not None:
                self._streams.discard(task)
        return response

    async def _end_streams(self, _app: web.Application) -> None:
        for task in self._streams:
            task.cancel()


def _frames(document: Document | None, parts: dict[str, str]) -> bytes:
    """One or two events. A comment line keeps the connection alive when nothing changed."""
    if document is None:
        return b": nothing new\n\n"
    text = f"event: state\ndata: {json.dumps(document)}\n\n"
    if parts:
        text += f"event: parts\ndata: {json.dumps(parts)}\n\n"
    return text.encode()


def _compressed(response: web.Response) -> web.Response:
    response.enable_compression()
    return response


async def _add_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
