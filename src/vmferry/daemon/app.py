"""The daemon's frame: binds its addresses, runs the services, says when it is ready, and stops as asked.

```
 bind api, peer, ops ─▶ services run ─▶ core started ─▶ peer and API answer ─▶ ready
 SIGTERM, SIGINT ─▶ not serving ─▶ drain (a second signal ends it) ─▶ servers stop ─▶ services are cancelled
```

Every task has a name and belongs to one TaskGroup. A service that returns, like one that raises, ends the daemon: it is
started again by its supervisor, and finds its pagers and jobs.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Coroutine, Mapping
from typing import NoReturn

import grpc
import structlog

from vmferry.aio.concurrency import first_error
from vmferry.api.server import ApiServer, Controls
from vmferry.daemon import log as events
from vmferry.daemon.config import Config
from vmferry.daemon.core import Assemble, Core
from vmferry.daemon.instance import HostUnfit
from vmferry.daemon.readiness import HostReadiness, Listeners
from vmferry.daemon.security import Security
from vmferry.errors import VmferryError
from vmferry.ops.rpc_metrics import RpcMetrics
from vmferry.ops.server import OpsServer
from vmferry.peer.contract import server_options
from vmferry.peer.servicer import PeerServicer
from vmferry.rpc.interceptor import CallReporter
from vmferry.v1.peer_pb2_grpc import add_PeerServicer_to_server

_log = structlog.stdlib.get_logger()

READINESS_S = 2.0
GRACE_S = 1.0
"""Time for open calls when the servers stop. A watch has no other end."""


class ServiceReturned(Exception):  # noqa: N818 - what happened
    """A task that must run as long as the daemon has returned."""


class Daemon:
    """One run of the daemon. `run` returns after a requested stop. Every other end is an exception."""

    def __init__(self, config: Config, assemble: Assemble, version: str) -> None:
        self._config = config
        self._assemble = assemble
        self._version = version
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listeners = Listeners()
        self._readiness = HostReadiness(config, self._listeners)

    def ask_to_stop(self) -> None:
        """The first call stops gracefully. The second one does not wait for jobs."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self) -> None:
        """Runs until asked to stop.

        Raises:
            HostUnfit: an address cannot be bound.
            VmferryError: a part could not start.
            ServiceReturned: a service ended by itself.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_to_stop)
        # A terminal that closes, or a log rotation that signals every daemon, must not end migrations.
        loop.add_signal_handler(signal.SIGHUP, _log.warning, events.DAEMON_HANGUP_IGNORED)
        _log.info(events.DAEMON_STARTING, version=self._version, state_dir=str(self._config.state_dir))
        security = Security(self._config)
        try:
            async with self._assemble(self._config, security) as core:
                await self._serve(core, security)
        finally:
            security.close()
        _log.info(events.DAEMON_STOPPED)

    async def _serve(self, core: Core, security: Security) -> None:
        rpcs = RpcMetrics()
        reporter = CallReporter(rpcs.observe)
        controls = Controls(core.migrations, core.moves, core.machines, core.qemus, core.state)
        api = ApiServer(controls, [reporter, security.api_gate])
        options = server_options(self._config.timeouts.peer_s)
        peer = grpc.aio.server(interceptors=[reporter, security.peer_gate], options=options)
        add_PeerServicer_to_server(PeerServicer(core.incoming, security.source_of), peer)
        ops = OpsServer(core.state, self._readiness, self._version, rpcs)
        try:
            api_port, peer_port = self._bind(api, peer, security)
            ops_port = await self._start_ops(ops)
            try:
                ports = {"api": api_port, "peer": peer_port, "ops": ops_port}
                services = {**core.services(), **security.services(), "ops": ops.run()}
                await self._run_services(services, core, api, peer, ports)
            except* ServiceReturned as group:
                raise first_error(group) from None
            except* VmferryError as group:
                raise first_error(group) from None
        finally:
            await api.stop(0)
            await peer.stop(0)
            await ops.stop()

    def _bind(self, api: ApiServer, peer: grpc.aio.Server, security: Security) -> tuple[int, int]:
        try:
            api_port = api.bind(str(self._config.api), security.bind_api)
        except VmferryError as error:
            raise HostUnfit(str(error)) from error
        try:
            return api_port, security.bind_peer(peer)
        except (OSError, RuntimeError) as error:
            raise _in_use("peer", self._config.peer) from error

    async def _start_ops(self, ops: OpsServer) -> int:
        try:
            return await ops.start(self._config.ops.host, self._config.ops.port)
        except OSError as error:
            raise _in_use("ops", self._config.ops) from error

    async def _run_services(
        self,
        services: Mapping[str, Coroutine[object, object, None]],
        core: Core,
        api: ApiServer,
        peer: grpc.aio.Server,
        ports: dict[str, int],
    ) -> None:
        async with asyncio.TaskGroup() as group:
            servers = {"api": api.wait(), "peer": peer.wait_for_termination()}
            running = [
                *(group.create_task(_service(name, work), name=name) for name, work in services.items()),
                *(group.create_task(self._server(name, ended), name=name) for name, ended in servers.items()),
            ]
            leading = group.create_task(self._lead(core, api, peer, ports), name="lead")
            await self._stop.wait()
            _log.info(events.DAEMON_STOPPING, limit_s=self._config.timeouts.stop_s)
            leading.cancel()
            await asyncio.wait({leading})
            await api.set_serving(False)
            await core.drain(self._config.timeouts.stop_s, self._hurry)
            await asyncio.gather(api.stop(GRACE_S), peer.stop(GRACE_S))
            for task in running:
                task.cancel()

    async def _server(self, name: str, ended: Coroutine[object, object, object]) -> None:
        """A gRPC server that nobody stopped and that has ended answers no call any more: its port is closed.

        Shielded: grpc's `wait_for_termination` hands a cancellation on to the future that its `stop` waits for.
        """
        await asyncio.shield(ended)
        if not self._stop.is_set():
            _log.error(events.DAEMON_TASK_RETURNED, task=name)
            raise ServiceReturned(f"the {name} server ended")

    async def _lead(self, core: Core, api: ApiServer, peer: grpc.aio.Server, ports: dict[str, int]) -> NoReturn:
        """Starts the servers, then follows readiness."""
        await core.started()
        _freeze_collector()
        await peer.start()
        await api.start()
        self._listeners.ports.update(ports)
        await self._follow_readiness(core, api)

    async def _follow_readiness(self, core: Core, api: ApiServer) -> NoReturn:
        """Hands the answer of /readyz to the health service, and each change of it to the log."""
        before: tuple[str, ...] | None = None
        while True:
            checks = await self._readiness.checks()
            core.state.note_checks(checks)
            causes = tuple(f"{check.name}: {check.detail}" for check in checks if not check.ok)
            if causes != before:
                if causes:
                    _log.warning(events.DAEMON_NOT_READY, causes=causes)
                else:
                    _log.info(events.DAEMON_READY, **self._listeners.ports)
                await api.set_serving(not causes)
                before = causes
            await asyncio.sleep(READINESS_S)


def _freeze_collector() -> None:
    """Freezes the objects made so far. A full garbage collection takes tens of milliseconds and may fall into a
    switchover; later ones look only at newer objects.
    """
    gc.collect()
    gc.freeze()


async def _service(name: str, work: Coroutine[object, object, None]) -> None:
    await work
    _log.error(events.DAEMON_TASK_RETURNED, task=name)
    raise ServiceReturned(f"the service {name!r} returned")


def _in_use(key: str, address: object) -> HostUnfit:
    return HostUnfit(
        f"The {key} address {address} cannot be listened on (in use, or not of this host). "
        f"Set [{key}] listen to a free address, or stop the program that uses it."
    )
