# ruff: noqa: N802  # gRPC names the methods
"""A daemon that answers as it was told to: a plain gRPC server with scripted servicers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from vmferry.v1 import (
    common_pb2,
    machines_pb2,
    machines_pb2_grpc,
    migrations_pb2,
    migrations_pb2_grpc,
    problems_pb2,
    problems_pb2_grpc,
    qemus_pb2,
    qemus_pb2_grpc,
)


def revision(number: int, phase: migrations_pb2.Phase, **more: Any) -> migrations_pb2.Migration:
    """A migration of web-1 as it is at that revision."""
    return migrations_pb2.Migration(migration_id="m1", vm="web-1", phase=phase, revision=number, **more)


COURSE = [
    revision(1, migrations_pb2.PHASE_QUEUED),
    revision(2, migrations_pb2.PHASE_POSTCOPY, progress=common_pb2.PageProgress(total=100, absent=40, poison=3)),
    revision(3, migrations_pb2.PHASE_COMPLETED, downtime_s=0.012, total_s=1.5),
]


def refuse(context: grpc.ServicerContext, code: int, reason: str, message: str, remedy: str = "") -> None:
    """Ends a call as a daemon does: google.rpc.ErrorInfo with the remedy in its metadata."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="vmferry")
    if remedy:
        info.metadata["remedy"] = remedy
    detail = AnyMessage()
    detail.Pack(info)
    context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=code, message=message, details=[detail])))


@dataclass
class Script:
    """The daemon's knowledge, and the calls that it received."""

    migrations: dict[str, migrations_pb2.Migration] = field(default_factory=dict)
    incoming: list[migrations_pb2.Migration] = field(default_factory=list)
    arrivals: list[migrations_pb2.Migration] = field(default_factory=list)
    """The changes that WatchIncoming sends."""
    problems: list[problems_pb2.Problem] = field(default_factory=list)
    revisions: list[migrations_pb2.Migration] = field(default_factory=list)
    machines: list[machines_pb2.Machine] = field(default_factory=list)
    errors: list[common_pb2.MemoryError] = field(default_factory=list)
    qemu: qemus_pb2.CheckQemuResponse = field(default_factory=qemus_pb2.CheckQemuResponse)
    asked: list[Any] = field(default_factory=list)
    break_watch_after: int | None = None
    """Ends the first watch with UNAVAILABLE after so many revisions, as a daemon that is restarted."""
    hang: bool = False
    configured_limit: int = 0


class ScriptedMigrations(migrations_pb2_grpc.MigrationsServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def CreateMigration(self, request, context):
        self._script.asked.append(request)
        if request.vm not in {machine.vm for machine in self._script.machines}:
            refuse(context, code_pb2.NOT_FOUND, "VM_UNKNOWN", f"No VM {request.vm} here.", "Ask another host.")
        return migrations_pb2.Migration(
            migration_id=request.migration_id,
            vm=request.vm,
            destination=request.destination,
            phase=migrations_pb2.PHASE_QUEUED,
            push_bytes_per_s=request.push_bytes_per_s or self._script.configured_limit,
        )

    def SetPushLimit(self, request, context):
        self._script.asked.append(request)
        if request.migration_id == "ended":
            refuse(context, code_pb2.FAILED_PRECONDITION, "MIGRATION_ENDED", "It has ended.")
        return migrations_pb2.Migration(
            migration_id=request.migration_id,
            phase=migrations_pb2.PHASE_POSTCOPY,
            push_bytes_per_s=request.push_bytes_per_s,
        )

    def GetMigration(self, request, context):
        if request.migration_id not in self._script.migrations and self._script.revisions:
            return self._script.revisions[0]
        if request.migration_id not in self._script.migrations:
            refuse(context, code_pb2.NOT_FOUND, "MIGRATION_UNKNOWN", f"No migration {request.migration_id}.")
        return self._script.migrations[request.migration_id]

    def ListMigrations(self, request, context):
        """Two a page, for any requested size."""
        self._script.asked.append(request)
        every = list(self._script.migrations.values())
        first = int(request.page_token or 0)
        more = first + 2 < len(every)
        return migrations_pb2.ListMigrationsResponse(
            migrations=every[first : first + 2], next_page_token=str(first + 2) if more else ""
        )

    def ListIncoming(self, request, context):
        return migrations_pb2.ListMigrationsResponse(migrations=self._script.incoming)

    def WatchIncoming(self, request, context):
        yield from self._script.arrivals

    def DeleteMigration(self, request, context):
        self._script.asked.append(request)
        return migrations_pb2.DeleteMigrationResponse()

    def WatchMigrations(self, request, context):
        self._script.asked.append(request)
        for sent, migration in enumerate(m for m in self._script.revisions if m.revision > request.after_revision):
            if sent == self._script.break_watch_after:
                self._script.break_watch_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "going down")
            yield migration

    def CancelMigration(self, request, context):
        refuse(context, code_pb2.FAILED_PRECONDITION, "PAST_NO_RETURN", "It runs on the destination.")


class ScriptedMachines(machines_pb2_grpc.MachinesServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def ListMachines(self, request, context):
        if self._script.hang:
            while context.is_active():
                time.sleep(0.01)
        return machines_pb2.ListMachinesResponse(machines=self._script.machines)

    def GetMachine(self, request, context):
        return next(machine for machine in self._script.machines if machine.vm == request.vm)

    def ListMemoryErrors(self, request, context):
        return machines_pb2.ListMemoryErrorsResponse(errors=self._script.errors)

    def WatchMemoryErrors(self, request, context):
        for revision, error in enumerate(self._script.errors, 1):
            yield machines_pb2.MemoryErrorChange(revision=revision, vm=request.vm, error=error)
        refuse(context, code_pb2.INTERNAL, "STORE_FAILED", "The database is gone.", "Look at the disk.")

    def ReportMemoryError(self, request, context):
        self._script.asked.append(request)
        return common_pb2.MemoryError(gpa=request.gpa, lsb=12, count=1, origin=common_pb2.ERROR_ORIGIN_OPERATOR)


class ScriptedQemus(qemus_pb2_grpc.QemusServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def AdoptQemu(self, request, context):
        del context
        self._script.asked.append(request)
        return qemus_pb2.AdoptQemuResponse(vm=request.vm or "web-1", vmm_pid=42, state="running")

    def CheckQemu(self, request, context):
        del context
        self._script.asked.append(request)
        return self._script.qemu


class ScriptedProblems(problems_pb2_grpc.ProblemsServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def ListProblems(self, request, context):
        return problems_pb2.ListProblemsResponse(problems=self._script.problems)


@contextmanager
def scripted_daemon(script: Script) -> Iterator[str]:
    """Serves the script; gives its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    migrations_pb2_grpc.add_MigrationsServicer_to_server(ScriptedMigrations(script), server)
    machines_pb2_grpc.add_MachinesServicer_to_server(ScriptedMachines(script), server)
    qemus_pb2_grpc.add_QemusServicer_to_server(ScriptedQemus(script), server)
    problems_pb2_grpc.add_ProblemsServicer_to_server(ScriptedProblems(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
