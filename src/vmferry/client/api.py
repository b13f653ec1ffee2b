"""A connection to a daemon's public API."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc

from vmferry.client.certificate import open_tunnel
from vmferry.client.refusal import UnreachableError, answered
from vmferry.v1 import machines_pb2 as mc
from vmferry.v1 import machines_pb2_grpc, migrations_pb2_grpc, problems_pb2_grpc, qemus_pb2_grpc
from vmferry.v1 import migrations_pb2 as mg
from vmferry.v1 import problems_pb2 as pr
from vmferry.v1 import qemus_pb2 as qm
from vmferry.v1.common_pb2 import MemoryError as LedgerError

if TYPE_CHECKING:
    from vmferry.v1.machines_pb2_grpc import MachinesAsyncStub
    from vmferry.v1.migrations_pb2_grpc import MigrationsAsyncStub
    from vmferry.v1.problems_pb2_grpc import ProblemsAsyncStub
    from vmferry.v1.qemus_pb2_grpc import QemusAsyncStub

T = TypeVar("T")
_Page = tuple[Iterable[T], str]
"""The items of a page, and the token of the next: empty after the last."""

PAGE_SIZE = 200
"""The page size for a list that is read to its end."""

_CHANNEL_OPTIONS = (
    # The CLI must reach a restarted daemon at once, not after minutes of exponential back-off.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Api:
    """The services; `timeout_s` is the deadline of each unary call."""

    address: str
    timeout_s: float
    migrations: MigrationsAsyncStub
    machines: MachinesAsyncStub
    qemus: QemusAsyncStub
    problems: ProblemsAsyncStub

    async def create(self, migration_id: str, vm: str, destination: str, push_bytes_per_s: int = 0) -> mg.Migration:
        """A limit of 0 is the daemon's configured one."""
        request = mg.CreateMigrationRequest(
            migration_id=migration_id, vm=vm, destination=destination, push_bytes_per_s=push_bytes_per_s
        )
        return await answered(self.migrations.CreateMigration(request, timeout=self.timeout_s))

    async def migration(self, migration_id: str) -> mg.Migration:
        request = mg.GetMigrationRequest(migration_id=migration_id)
        return await answered(self.migrations.GetMigration(request, timeout=self.timeout_s))

    async def cancel(self, migration_id: str) -> mg.Migration:
        request = mg.CancelMigrationRequest(migration_id=migration_id)
        return await answered(self.migrations.CancelMigration(request, timeout=self.timeout_s))

    async def set_push_limit(self, migration_id: str, push_bytes_per_s: int) -> mg.Migration:
        """Limits the push, bytes per second; 0: no limit."""
        request = mg.SetMigrationPushLimitRequest(migration_id=migration_id, push_bytes_per_s=push_bytes_per_s)
        return await answered(self.migrations.SetPushLimit(request, timeout=self.timeout_s))

    def list_migrations(self, wanted: str = "") -> AsyncGenerator[mg.Migration, None]:
        """All migrations that match the filter, page by page."""

        async def page(token: str) -> _Page[mg.Migration]:
            request = mg.ListMigrationsRequest(page_size=PAGE_SIZE, page_token=token, filter=wanted)
            answer = await answered(self.migrations.ListMigrations(request, timeout=self.timeout_s))
            return answer.migrations, answer.next_page_token

        return _of_all_pages(page)

    async def check_create(self, vm: str, destination: str, push_bytes_per_s: int = 0) -> mg.Migration:
        """Asks whether a migration could begin. It starts nothing."""
        request = mg.CreateMigrationRequest(
            migration_id="dry-run",
            vm=vm,
            destination=destination,
            push_bytes_per_s=push_bytes_per_s,
            validate_only=True,
        )
        return await answered(self.migrations.CreateMigration(request, timeout=self.timeout_s))

    def list_incoming(self, wanted: str = "") -> AsyncGenerator[mg.Migration, None]:
        """All migrations into the daemon's host that match the filter, page by page."""

        async def page(token: str) -> _Page[mg.Migration]:
            request = mg.ListIncomingRequest(page_size=PAGE_SIZE, page_token=token, filter=wanted)
            answer = await answered(self.migrations.ListIncoming(request, timeout=self.timeout_s))
            return answer.migrations, answer.next_page_token

        return _of_all_pages(page)

    async def delete(self, migration_id: str) -> None:
        request = mg.DeleteMigrationRequest(migration_id=migration_id)
        await answered(self.migrations.DeleteMigration(request, timeout=self.timeout_s))

    async def list_problems(self) -> Sequence[pr.Problem]:
        """The problems of the daemon's host, the worst first."""
        answer = await answered(self.problems.ListProblems(pr.ListProblemsRequest(), timeout=self.timeout_s))
        return tuple(answer.problems)

    async def machine(self, vm: str) -> mc.Machine:
        return await answered(self.machines.GetMachine(mc.GetMachineRequest(vm=vm), timeout=self.timeout_s))

    def list_machines(self) -> AsyncGenerator[mc.Machine, None]:
        async def page(token: str) -> _Page[mc.Machine]:
            request = mc.ListMachinesRequest(page_size=PAGE_SIZE, page_token=token)
            answer = await answered(self.machines.ListMachines(request, timeout=self.timeout_s))
            return answer.machines, answer.next_page_token

        return _of_all_pages(page)

    def memory_errors(self, vm: str) -> AsyncGenerator[LedgerError, None]:
        async def page(token: str) -> _Page[LedgerError]:
            request = mc.ListMemoryErrorsRequest(vm=vm, page_size=PAGE_SIZE, page_token=token)
            answer = await answered(self.machines.ListMemoryErrors(request, timeout=self.timeout_s))
            return answer.errors, answer.next_page_token

        return _of_all_pages(page)

    async def report_error(self, vm: str, gpa: int, lsb: int = 0) -> LedgerError:
        request = mc.ReportMemoryErrorRequest(vm=vm, gpa=gpa, lsb=lsb)
        return await answered(self.machines.ReportMemoryError(request, timeout=self.timeout_s))

    async def adopt_qemu(self, monitor: str, vm: str) -> qm.AdoptQemuResponse:
        """`vm`: "" is QEMU's own name."""
        return await answered(self.qemus.AdoptQemu(qm.AdoptQemuRequest(monitor=monitor, vm=vm), timeout=self.timeout_s))

    async def check_qemu(self, vm: str, destination: qm.QemuProfile | None = None) -> qm.CheckQemuResponse:
        request = qm.CheckQemuRequest(vm=vm, destination=destination)
        return await answered(self.qemus.CheckQemu(request, timeout=self.timeout_s))


async def _of_all_pages(page: Callable[[str], Awaitable[_Page[T]]]) -> AsyncGenerator[T, None]:
    """Yields the items of each page. The next page is asked for once this one is taken."""
    token = ""
    while True:
        items, token = await page(token)
        for item in items:
            yield item
        if not token:
            return


@asynccontextmanager
async def open_api(address: str, timeout_s: float, environment: Mapping[str, str] = os.environ) -> AsyncIterator[Api]:
    """A channel to the daemon at "host:port" or "unix:PATH". It connects on the first call.

    The environment names the caller's certificate (`client/certificate.py`). Without one the connection is plain.

    Raises: UnreachableError, the certificate cannot be used, or no daemon answered a call.
    """
    tunnel = None if address.startswith("unix:") else open_tunnel(address, timeout_s, environment)
    try:
        target = tunnel.target if tunnel else address
        async with grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
            yield Api(
                address,
                timeout_s,
                migrations_pb2_grpc.MigrationsStub(channel),
                machines_pb2_grpc.MachinesStub(channel),
                qemus_pb2_grpc.QemusStub(channel),
                problems_pb2_grpc.ProblemsStub(channel),
            )
    except UnreachableError as error:
        if tunnel is None or not tunnel.failure:
            raise
        raise UnreachableError(error.reason, f"no daemon answers: {tunnel.failure}", error.remedy) from None
    finally:
        if tunnel is not None:
            await tunnel.close()
