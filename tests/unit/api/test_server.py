"""The API over real gRPC on loopback, with a scripted control behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, replace

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.scripted.api import ScriptedControl
from vmferry.api.server import SERVICES, ApiServer, Controls
from vmferry.demo.patience import patient
from vmferry.errors import VmferryError
from vmferry.model.memory_error import LedgerEntry, Origin
from vmferry.model.migration import Phase
from vmferry.units import PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST, Gpa
from vmferry.v1 import machines_pb2, machines_pb2_grpc, migrations_pb2, migrations_pb2_grpc


@dataclass
class Api:
    control: ScriptedControl
    server: ApiServer
    channel: grpc.aio.Channel
    port: int

    @property
    def migrations(self) -> migrations_pb2_grpc.MigrationsAsyncStub:
        return migrations_pb2_grpc.MigrationsStub(self.channel)  # type: ignore[return-value]

    @property
    def machines(self) -> machines_pb2_grpc.MachinesAsyncStub:
        return machines_pb2_grpc.MachinesStub(self.channel)  # type: ignore[return-value]


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    control = ScriptedControl()
    server = ApiServer(Controls(control, control, control, control, control))
    port = server.bind("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Api(control, server, channel, port)
    await server.stop(0)


@dataclass
class Refusal:
    code: grpc.StatusCode
    reason: str
    remedy: str
    fields: list[str]


async def refusal(call: Awaitable[object]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata = dict(caught.value.trailing_metadata() or ())  # type: ignore[call-overload]
    rich = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in rich.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    assert info.domain == "vmferry"
    assert rich.code == caught.value.code().value[0]
    return Refusal(caught.value.code(), info.reason, info.metadata["remedy"], [v.field for v in bad.field_violations])


def create(migration: str = "m1", vm: str = "web-1", to: str = "h:7601") -> migrations_pb2.CreateMigrationRequest:
    return migrations_pb2.CreateMigrationRequest(migration_id=migration, vm=vm, destination=to)


async def test_create_then_get(api: Api) -> None:
    made = await api.migrations.CreateMigration(create())
    assert (made.migration_id, made.phase, made.revision) == ("m1", migrations_pb2.PHASE_QUEUED, 1)
    assert made.create_time.ToMicroseconds() == 1_000_000
    got = await api.migrations.GetMigration(migrations_pb2.GetMigrationRequest(migration_id="m1"))
    assert got.vm == "web-1"
    assert not got.HasField("end_time")


async def test_every_wrong_field_is_named_at_once(api: Api) -> None:
    refused = await refusal(api.migrations.CreateMigration(create("M!", "", "nowhere")))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.reason == "INVALID_ARGUMENT"
    assert refused.fields == ["migration_id", "vm", "destination"]
    assert api.control.table == {}


@pytest.mark.parametrize("to", ["h", "h:", "h:0", "h:70000", ":7", "a b:7", "h:7:7", "[::g]:7", "-h:7"])
async def test_a_destination_must_be_host_and_port(api: Api, to: str) -> None:
    assert (await refusal(api.migrations.CreateMigration(create(to=to)))).fields == ["destination"]


@pytest.mark.parametrize("to", ["h:7", "10.0.0.1:7601", "[::1]:7601", "a-b.example:65535"])
async def test_a_good_destination_is_taken(api: Api, to: str) -> None:
    assert (await api.migrations.CreateMigration(create(to=to))).destination == to


async def test_refusals_of_the_core_carry_reason_and_remedy(api: Api) -> None:
    refused = await refusal(api.migrations.GetMigration(migrations_pb2.GetMigrationRequest(migration_id="m9")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MIGRATION_UNKNOWN")
    assert refused.remedy == "Ask for one that is."
    await api.migrations.CreateMigration(create())
    assert (await refusal(api.migrations.CreateMigration(create()))).code == grpc.StatusCode.ALREADY_EXISTS
    refused = await refusal(api.migrations.CancelMigration(migrations_pb2.CancelMigrationRequest(migration_id="m1")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PAST_NO_RETURN")


def limit(value: int, migration: str = "m1") -> migrations_pb2.SetMigrationPushLimitRequest:
    return migrations_pb2.SetMigrationPushLimitRequest(migration_id=migration, push_bytes_per_s=value)


async def test_a_push_limit_is_taken_at_the_start_and_changed(api: Api) -> None:
    request = create()
    request.push_bytes_per_s = 5_000_000
    assert (await api.migrations.CreateMigration(request)).push_bytes_per_s == 5_000_000
    for value in (PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST, 0):
        assert (await api.migrations.SetPushLimit(limit(value))).push_bytes_per_s == value
    got = await api.migrations.GetMigration(migrations_pb2.GetMigrationRequest(migration_id="m1"))
    assert (got.push_bytes_per_s, got.revision) == (0, 4)


@pytest.mark.parametrize("value", [1, PUSH_LIMIT_LEAST - 1, PUSH_LIMIT_MOST + 1, 2**64 - 1])
async def test_a_push_limit_that_means_nothing_is_refused(api: Api, value: int) -> None:
    request = create()
    request.push_bytes_per_s = value
    assert (await refusal(api.migrations.CreateMigration(request))).fields == ["push_bytes_per_s"]
    refused = await refusal(api.migrations.SetPushLimit(limit(value, "M!")))
    assert (refused.code, refused.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ["migration_id", "push_bytes_per_s"],
    )


async def test_a_push_limit_of_a_job_that_is_not_or_has_ended(api: Api) -> None:
    refused = await refusal(api.migrations.SetPushLimit(limit(0)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "MIGRATION_UNKNOWN")
    await api.migrations.CreateMigration(create())
    await api.control.publish(replace(api.control.table["m1"], phase=Phase.COMPLETED, revision=2))
    refused = await refusal(api.migrations.SetPushLimit(limit(0)))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MIGRATION_ENDED")


async def test_list_by_pages_and_filter(api: Api) -> None:
    for number in range(5):
        await api.migrations.CreateMigration(create(f"m{number}", vm="a" if number % 2 else "b"))
    request = migrations_pb2.ListMigrationsRequest(page_size=2, filter='vm = b AND phase = "QUEUED"')
    first = await api.migrations.ListMigrations(request)
    assert [m.migration_id for m in first.migrations] == ["m0", "m2"]
    request.page_token = first.next_page_token
    last = await api.migrations.ListMigrations(request)
    assert ([m.migration_id for m in last.migrations], last.next_page_token) == (["m4"], "")
    request.filter = "vm = a"
    assert (await refusal(api.migrations.ListMigrations(request))).fields == ["page_token"]
    wrong = migrations_pb2.ListMigrationsRequest(page_size=-1, filter="colour = red")
    assert (await refusal(api.migrations.ListMigrations(wrong))).fields == ["page_size", "filter"]


async def test_watch_misses_nothing_and_ends_after_the_terminal_revision(api: Api) -> None:
    made = await api.migrations.CreateMigration(create())
    call = api.migrations.WatchMigrations(migrations_pb2.WatchMigrationsRequest(migration_id="m1"))
    messages = aiter(call)
    seen = [await anext(messages)]
    job = api.control.table["m1"]
    for phase in (Phase.PREPARING, Phase.SWITCHOVER, Phase.POSTCOPY, Phase.COMPLETED):
        job = replace(job, phase=phase, revision=job.revision + 1)
        await api.control.publish(job)
    seen += [message async for message in messages]
    assert [m.revision for m in seen] == [1, 2, 3, 4, 5]
    assert seen[-1].phase == migrations_pb2.PHASE_COMPLETED
    later = api.migrations.WatchMigrations(
        migrations_pb2.WatchMigrationsRequest(migration_id="m1", after_revision=made.revision + 2)
    )
    assert [m.revision async for m in later] == [4, 5]


@pytest.mark.parametrize("ends", ["cancel", "deadline"])
async def test_a_watch_whose_client_leaves_ends_its_work(api: Api, ends: str) -> None:
    request = migrations_pb2.WatchMigrationsRequest()
    call = api.migrations.WatchMigrations(request, timeout=0.3 if ends == "deadline" else None)
    reading = asyncio.create_task(call.read())
    await asyncio.sleep(0.1)
    if ends == "cancel":
        call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    async with asyncio.timeout(patient(30)):
        while not api.control.closed:  # noqa: ASYNC110 - the scripted control has no event for it
            await asyncio.sleep(0.01)


async def test_watch_of_nothing_is_refused(api: Api) -> None:
    call = api.migrations.WatchMigrations(migrations_pb2.WatchMigrationsRequest(migration_id="m9"))
    assert (await refusal(call.read())).reason == "MIGRATION_UNKNOWN"
    call = api.migrations.WatchMigrations(migrations_pb2.WatchMigrationsRequest(migration_id="M"))
    assert (await refusal(call.read())).fields == ["migration_id"]


@pytest.mark.parametrize("revision", [1 << 63, (1 << 64) - 1])
async def test_a_watch_behind_every_possible_revision_is_refused(api: Api, revision: int) -> None:
    errors = api.machines.WatchMemoryErrors(machines_pb2.WatchMemoryErrorsRequest(after_revision=revision))
    assert (await refusal(errors.read())).fields == ["after_revision"]
    jobs = api.migrations.WatchMigrations(migrations_pb2.WatchMigrationsRequest(after_revision=revision))
    assert (await refusal(jobs.read())).fields == ["after_revision"]


async def test_machines(api: Api) -> None:
    listed = await api.machines.ListMachines(machines_pb2.ListMachinesRequest(page_size=2))
    assert [m.vm for m in listed.machines] == ["web-1", "web-1"]
    rest = await api.machines.ListMachines(machines_pb2.ListMachinesRequest(page_token=listed.next_page_token))
    assert [m.vm for m in rest.machines] == ["web-2"]
    got = await api.machines.GetMachine(machines_pb2.GetMachineRequest(vm="web-1"))
    assert (got.state, got.layout.regions[0].size) == (machines_pb2.MACHINE_STATE_RUNNING, 1 << 29)
    assert not got.HasField("progress")
    refused = await refusal(api.machines.GetMachine(machines_pb2.GetMachineRequest(vm="none")))
    assert (refused.code, refused.reason) == (grpc.StatusCode.NOT_FOUND, "VM_UNKNOWN")


async def test_memory_errors(api: Api) -> None:
    api.control.ledgers["web-1"] = [LedgerEntry(Gpa(gpa), Origin.READ) for gpa in (0x3000, 0x1000, 0x2000)]
    request = machines_pb2.ListMemoryErrorsRequest(vm="web-1", page_size=2)
    page = await api.machines.ListMemoryErrors(request)
    assert [e.gpa for e in page.errors] == [0x1000, 0x2000]
    request.page_token = page.next_page_token
    assert [e.gpa for e in (await api.machines.ListMemoryErrors(request)).errors] == [0x3000]
    made = await api.machines.ReportMemoryError(machines_pb2.ReportMemoryErrorRequest(vm="web-1", gpa=0x5000))
    assert (made.gpa, made.lsb) == (0x5000, 12)
    watch = api.machines.WatchMemoryErrors(machines_pb2.WatchMemoryErrorsRequest(vm="web-1", after_revision=2))
    assert [(c.revision, c.error.gpa) async for c in watch] == [(3, 0x2000), (4, 0x5000)]


@pytest.mark.parametrize(
    ("gpa", "lsb", "field"), [(1, 0, "gpa"), (0x1000, 21, "gpa"), (1 << 52, 0, "gpa"), (0, 11, "lsb"), (0, 31, "lsb")]
)
async def test_a_reported_error_must_be_a_block_of_memory(api: Api, gpa: int, lsb: int, field: str) -> None:
    request = machines_pb2.ReportMemoryErrorRequest(vm="web-1", gpa=gpa, lsb=lsb)
    assert (await refusal(api.machines.ReportMemoryError(request))).fields == [field]


async def test_health_follows_readiness(api: Api) -> None:
    stub = health_pb2_grpc.HealthStub(api.channel)
    for serving in (False, True):
        await api.server.set_serving(serving)
        for name in ("", *SERVICES):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is serving


async def test_reflection_lists_the_services(api: Api) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    answer = await call.read()
    assert set(SERVICES) <= {service.name for service in answer.list_services_response.service}


async def test_an_address_in_use_is_said(api: Api) -> None:
    other = ApiServer(Controls(api.control, api.control, api.control, api.control, api.control))
    with pytest.raises(VmferryError, match="cannot be listened on"):
        other.bind(f"127.0.0.1:{api.port}")
    await other.stop(0)
