"""The Migrations service: checks the request, asks `MigrationControl`, converts the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from vmferry.api import filter as job_filter
from vmferry.api.answer import Context, answered, caller, invalid, streamed
from vmferry.api.control import MigrationControl, MoveControl
from vmferry.api.messages import direction_from_pb, facts_to_pb
from vmferry.api.page_token import DEFAULT_SIZE, MAX_SIZE, Page, PageTokenError, paginate
from vmferry.api.validation import Checks
from vmferry.model.facts import MoveFacts
from vmferry.model.migration import TERMINAL, Job
from vmferry.model.vocabulary import MEANING
from vmferry.v1 import migrations_pb2 as pb
from vmferry.v1.migrations_pb2_grpc import MigrationsServicer as GeneratedServicer

Listed = TypeVar("Listed", Job, MoveFacts)
CHUNK = 10
"""The messages that are made before other tasks have their turn."""


class MigrationsServicer(GeneratedServicer):
    """Migrations. A `VmferryError` of the control becomes the call's status. The client's deadline ends the server's
    work too.
    """

    def __init__(self, control: MigrationControl, moves: MoveControl) -> None:
        self._control = control
        self._moves = moves

    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: Context) -> pb.Migration:  # noqa: N802
        return await answered(context, self._create(request, caller(context)))

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
            yield self._message(job)

    async def ListIncoming(  # noqa: N802
        self, request: pb.ListIncomingRequest, context: Context
    ) -> pb.ListMigrationsResponse:
        return await answered(context, self._list_incoming(request))

    async def WatchIncoming(  # noqa: N802
        self, request: pb.WatchIncomingMigrationsRequest, context: Context
    ) -> AsyncIterator[pb.Migration]:
        del request
        async for facts in streamed(context, self._moves.watch_incoming()):
            yield facts_to_pb(facts)

    async def DeleteMigration(  # noqa: N802
        self, request: pb.DeleteMigrationRequest, context: Context
    ) -> pb.DeleteMigrationResponse:
        return await answered(context, self._delete(request))

    async def _create(self, request: pb.CreateMigrationRequest, requested_by: str) -> pb.Migration:
        checks = Checks()
        checks.migration_id(request.migration_id)
        checks.vm(request.vm)
        checks.destination(request.destination)
        checks.push_limit(request.push_bytes_per_s)
        checks.done()
        if request.validate_only:
            host = await self._control.validate(request.vm, request.destination)
            return pb.Migration(
                migration_id=request.migration_id,
                vm=request.vm,
                destination=request.destination,
                destination_host=host,
                push_bytes_per_s=request.push_bytes_per_s,
                requested_by=requested_by,
            )
        return self._message(
            await self._control.create(
                request.migration_id, request.vm, request.destination, request.push_bytes_per_s, requested_by
            )
        )

    async def _get(self, request: pb.GetMigrationRequest) -> pb.Migration:
        _check_id(request.migration_id)
        return facts_to_pb(await self._moves.facts(request.migration_id, direction_from_pb(request.direction)))

    async def _delete(self, request: pb.DeleteMigrationRequest) -> pb.DeleteMigrationResponse:
        _check_id(request.migration_id)
        await self._moves.delete(request.migration_id, direction_from_pb(request.direction))
        return pb.DeleteMigrationResponse()

    async def _cancel(self, request: pb.CancelMigrationRequest) -> pb.Migration:
        _check_id(request.migration_id)
        return self._message(await self._control.cancel(request.migration_id))

    async def _set_push_limit(self, request: pb.SetMigrationPushLimitRequest) -> pb.Migration:
        checks = Checks()
        checks.migration_id(request.migration_id)
        checks.push_limit(request.push_bytes_per_s)
        checks.done()
        return self._message(await self._control.set_push_limit(request.migration_id, request.push_bytes_per_s))

    async def _list(self, request: pb.ListMigrationsRequest) -> pb.ListMigrationsResponse:
        wanted = _checked(request)
        page = _cut(_in_order(await self._control.jobs(), wanted), request, "migrations")
        return pb.ListMigrationsResponse(
            migrations=await _in_turns(page.items, self._moves.of_job), next_page_token=page.next_token
        )

    async def _list_incoming(self, request: pb.ListIncomingRequest) -> pb.ListMigrationsResponse:
        wanted = _checked(request)
        page = _cut(_in_order(self._moves.incoming(), wanted), request, "incoming")
        return pb.ListMigrationsResponse(
            migrations=await _in_turns(page.items, lambda facts: facts), next_page_token=page.next_token
        )

    def _message(self, job: Job) -> pb.Migration:
        return facts_to_pb(self._moves.of_job(job))

    async def _watch(self, request: pb.WatchMigrationsRequest) -> AsyncIterator[Job]:
        checks = Checks()
        checks.migration_id(request.migration_id, optional=True)
        checks.revision(request.after_revision)
        if request.from_now and (request.after_revision or request.migration_id):
            checks.violation("from_now", "excludes after_revision and migration_id")
        checks.done()
        if request.from_now:
            async for job in self._control.watch_from_now():
                yield job
        async for job in self._control.watch(request.migration_id, request.after_revision):
            yield job


def _check_id(migration: str) -> None:
    checks = Checks()
    checks.migration_id(migration)
    checks.done()


def _checked(request: pb.ListMigrationsRequest | pb.ListIncomingRequest) -> job_filter.Filter:
    checks = Checks()
    checks.page_size(request.page_size, MAX_SIZE, DEFAULT_SIZE)
    wanted = job_filter.Filter()
    try:
        wanted = job_filter.parse(request.filter)
    except job_filter.FilterError as error:
        checks.violation("filter", str(error))
    checks.done()
    return wanted


def _cut(
    items: Sequence[Listed], request: pb.ListMigrationsRequest | pb.ListIncomingRequest, query: str
) -> Page[Listed]:
    try:
        return paginate(items, _key, request.page_size, request.page_token, f"{query}?{request.filter}")
    except PageTokenError as error:
        raise invalid("page_token", str(error)) from error


def _in_order(items: Sequence[Listed], wanted: job_filter.Filter) -> list[Listed]:
    """The wanted items in the order of `_key`. The ended ones come in the order of their ends, and need no key."""
    every = wanted == job_filter.Filter()
    found = [item for item in items if every or wanted.matches(item)]
    active = [item for item in found if item.phase not in TERMINAL]
    return sorted(active, key=_key) + [item for item in reversed(found) if item.phase in TERMINAL]


async def _in_turns(items: Sequence[Listed], facts_of: Callable[[Listed], MoveFacts]) -> list[pb.Migration]:
    """The messages, with a turn for other tasks between chunks of them."""
    made: list[pb.Migration] = []
    for start in range(0, len(items), CHUNK):
        made += [facts_to_pb(facts_of(item)) for item in items[start : start + CHUNK]]
        await asyncio.sleep(0)
    return made


def _key(item: Job | MoveFacts) -> str:
    """Problems come first, then migrations under way, the newest first of each."""
    meaning = MEANING[item.phase]
    ended = item.phase in TERMINAL
    rank = 2 if ended else 0 if meaning.problem else 1
    newest_first = (1 << 63) - (item.ended_us if ended else item.created_us)
    return f"{rank} {newest_first:020} {item.migration}"
