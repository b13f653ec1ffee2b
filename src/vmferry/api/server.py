"""The control plane's gRPC server: Migrations, Machines, Qemus, Problems, health and reflection on one address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection

from vmferry.api.control import MachineControl, MigrationControl, MoveControl, ProblemControl, QemuControl
from vmferry.api.machines import MachinesServicer
from vmferry.api.migrations import MigrationsServicer
from vmferry.api.problems import ProblemsServicer
from vmferry.api.qemus import QemusServicer
from vmferry.errors import Reason, VmferryError
from vmferry.v1 import (
    machines_pb2,
    machines_pb2_grpc,
    migrations_pb2,
    migrations_pb2_grpc,
    problems_pb2,
    problems_pb2_grpc,
    qemus_pb2,
    qemus_pb2_grpc,
)

SERVICES = (
    migrations_pb2.DESCRIPTOR.services_by_name["Migrations"].full_name,
    machines_pb2.DESCRIPTOR.services_by_name["Machines"].full_name,
    qemus_pb2.DESCRIPTOR.services_by_name["Qemus"].full_name,
    problems_pb2.DESCRIPTOR.services_by_name["Problems"].full_name,
)
Interceptor: TypeAlias = "grpc.aio.ServerInterceptor[Any, Any]"
OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 1 << 20))
"""Without SO_REUSEPORT a port in use is an error, not a shared port. No request of this API is near 1 MiB."""


@dataclass(frozen=True, slots=True)
class Controls:
    """The parts of the daemon behind the services."""

    migrations: MigrationControl
    moves: MoveControl
    machines: MachineControl
    qemus: QemuControl
    problems: ProblemControl


class ApiServer:
    """The server. It starts as not serving; `set_serving` follows the daemon's readiness."""

    def __init__(self, controls: Controls, interceptors: Sequence[Interceptor] = ()) -> None:
        self._server = grpc.aio.server(options=OPTIONS, interceptors=interceptors)
        self._health = health_aio.HealthServicer()
        migrations_pb2_grpc.add_MigrationsServicer_to_server(
            MigrationsServicer(controls.migrations, controls.moves), self._server
        )
        machines_pb2_grpc.add_MachinesServicer_to_server(MachinesServicer(controls.machines), self._server)
        qemus_pb2_grpc.add_QemusServicer_to_server(QemusServicer(controls.qemus), self._server)
        problems_pb2_grpc.add_ProblemsServicer_to_server(ProblemsServicer(controls.problems), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, HEALTH_NAME, reflection.SERVICE_NAME), self._server)

    def bind(self, address: str, listen: Callable[[grpc.aio.Server], int] | None = None) -> int:
        """Takes the address by `listen`, plain without it, and returns the port. Calls are answered after `start`.

        Raises:
            VmferryError: INTERNAL, the address cannot be bound.
        """
        try:
            return listen(self._server) if listen else self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            raise VmferryError(
                Reason.INTERNAL,
                f"The API address {address} cannot be listened on (in use, or not of this host).",
                "Set [api] listen to a free address, or stop the program that uses it.",
            ) from error

    async def start(self) -> None:
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICES):
            await self._health.set(name, state)

    async def wait(self) -> None:
        """Returns when the server has ended, after a stop or by itself."""
        await self._server.wait_for_termination()

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls. Open calls have `grace_s`, then they are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
