"""The Migrations service: checks the request, asks `MigrationControl`, converts the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from vmferry.aio.wall_clock import now_us
from vmferry.api import filter as job_filter
from vmferry.api.answer import Context, answered, invalid, streamed
from vmferry.api.control import MigrationControl
from vmferry.api.messages import job_to_pb
from vmferry.api.page_token import DEFAULT_SIZE, MAX_SIZE, PageTokenError, paginate
from vmferry.api.validation import Checks
from vmferry.model.migration import Job
from vmferry.v1 import migrations_pb2 as pb
from vmferry.v1.migrations_pb2_grpc import MigrationsServicer as GeneratedServicer


class MigrationsServicer(GeneratedServicer):
    """Migrations. A `VmferryError` of the control becomes the call's status. The client's deadline ends the server's
    work too.
    """

    def __init__(self, control: MigrationControl) -> None:
        self._control = control

    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: Context) -> pb.Migration:  # noqa: N802
        return await answered(context, self._create(request))

    async def GetMigration(self, request: pb.GetMigrationRequest, context: Context) -> pb.Migration:  # noqa: N802
        return await answered(context, self._get(request))

    async def ListMigrations(  # noqa: N802
        self, request: pb.ListMigrationsRequest, context: Context
    ) -> pb.ListMigrationsResponse:
        return await answered(context, self._list(request))

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: Context) -> pb.Migration:  # noqa: N802
        return await answered(context, self._cancel(request))

    async def SetPushLimit(self, request: pb.SetMigrationPushLimitRequest, context: Context) -> pb.Migration:  # noqa: N802
        return await answered(context, self._set_push_limit(request))

    async def WatchMigrations(  # noqa: N802
        self, request: pb.WatchMigrationsRequest, context: Context
    ) -> AsyncIterator[pb.Migration]:
        async for job in streamed(context, self._watch(request)):
            yield _message(job)

    async def _create(self, request: pb.CreateMigrationRequest) -> pb.Migration:
        checks = Checks()
        checks.migration_id(request.migration_id)
        checks.vm(request.vm)
        checks.destination(request.destination)
        checks.push_limit(request.push_bytes_per_s)
        checks.done()
        return _message(
            await self._control.create(request.migration_id, request.vm, request.destination, request.push_bytes_per_s)
        )

    async def _get(self, request: pb.GetMigrationRequest) -> pb.Migration:
        _check_id(request.migration_id)
        return _message(await self._control.job(request.migration_id))

    async def _cancel(self, request: pb.CancelMigrationRequest) -> pb.Migration:
        _check_id(request.migration_id)
        return _message(await self._control.cancel(request.migration_id))

    async def _set_push_limit(self, request: pb.SetMigrationPushLimitRequest) -> pb.Migration:
        checks = Checks()
        checks.migration_id(request.migration_id)
        checks.push_limit(request.push_bytes_per_s)
        checks.done()
        return _message(await self._control.set_push_limit(request.migration_id, request.push_bytes_per_s))

    async def _list(self, request: pb.ListMigrationsRequest) -> pb.ListMigrationsResponse:
        checks = Checks()
        checks.page_size(request.page_size, MAX_SIZE, DEFAULT_SIZE)
        wanted = job_filter.Filter()
        try:
            wanted = job_filter.parse(request.filter)
        except job_filter.FilterError as error:
            checks.violation("filter", str(error))
        checks.done()
        jobs = sorted((j for j in await self._control.jobs() if wanted.matches(j)), key=lambda j: j.migration)
        try:
            page = paginate(
                jobs, lambda j: j.migration, request.page_size, request.page_token, f"migrations?{request.filter}"
            )
        except PageTokenError as error:
            raise invalid("page_token", str(error)) from error
        return pb.ListMigrationsResponse(
            migrations=[_message(job) for job in page.items], next_page_token=page.next_token
        )

    async def _watch(self, request: pb.WatchMigrationsRequest) -> AsyncIterator[Job]:
        checks = Checks()
        checks.migration_id(request.migration_id, optional=True)
        checks.revision(request.after_revision)
        checks.done()
        async for job in self._control.watch(request.migration_id, request.after_revision):
            yield job


def _check_id(migration: str) -> None:
    checks = Checks()
    checks.migration_id(migration)
    checks.done()


def _message(job: Job) -> pb.Migration:
    return job_to_pb(job, now_us())
