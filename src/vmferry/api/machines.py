"""The Machines service: checks the request, asks `MachineControl`, converts the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from vmferry.api.answer import Context, answered, invalid, streamed
from vmferry.api.control import MachineControl
from vmferry.api.messages import machine_to_pb
from vmferry.api.page_token import DEFAULT_SIZE, MAX_SIZE, PageTokenError, paginate
from vmferry.api.validation import Checks
from vmferry.errors import Reason, VmferryError
from vmferry.migration.inventory import Machine, MachineState
from vmferry.model.memory_error import LedgerEntry
from vmferry.rpc import convert as wire
from vmferry.v1 import common_pb2
from vmferry.v1 import machines_pb2 as pb
from vmferry.v1.machines_pb2_grpc import MachinesServicer as GeneratedServicer


class MachinesServicer(GeneratedServicer):
    """Machines. A `VmferryError` of the control becomes the call's status. The client's deadline ends the server's work
    too.
    """

    def __init__(self, control: MachineControl) -> None:
        self._control = control

    async def ListMachines(self, request: pb.ListMachinesRequest, context: Context) -> pb.ListMachinesResponse:  # noqa: N802
        return await answered(context, self._list(request))

    async def GetMachine(self, request: pb.GetMachineRequest, context: Context) -> pb.Machine:  # noqa: N802
        return await answered(context, self._get(request))

    async def ListMemoryErrors(  # noqa: N802
        self, request: pb.ListMemoryErrorsRequest, context: Context
    ) -> pb.ListMemoryErrorsResponse:
        return await answered(context, self._list_errors(request))

    async def ReportMemoryError(  # noqa: N802
        self, request: pb.ReportMemoryErrorRequest, context: Context
    ) -> common_pb2.MemoryError:
        return await answered(context, self._report(request))

    async def WatchMemoryErrors(  # noqa: N802
        self, request: pb.WatchMemoryErrorsRequest, context: Context
    ) -> AsyncIterator[pb.MemoryErrorChange]:
        async for revision, vm, entry in streamed(context, self._watch(request)):
            yield pb.MemoryErrorChange(revision=revision, vm=vm, error=wire.error_to_pb(entry))

    async def _list(self, request: pb.ListMachinesRequest) -> pb.ListMachinesResponse:
        _check_page(request.page_size)
        machines = sorted(await self._control.machines(), key=_machine_key)
        try:
            page = paginate(machines, _machine_key, request.page_size, request.page_token, "machines")
        except PageTokenError as error:
            raise invalid("page_token", str(error)) from error
        return pb.ListMachinesResponse(
            machines=[machine_to_pb(machine) for machine in page.items], next_page_token=page.next_token
        )

    async def _get(self, request: pb.GetMachineRequest) -> pb.Machine:
        _check_vm(request.vm)
        of_name = [machine for machine in await self._control.machines() if machine.vm == request.vm]
        if not of_name:
            raise VmferryError(
                Reason.VM_UNKNOWN, f"No VM {request.vm!r} is known here.", "List the known VMs with `vmferry machines`."
            )
        return machine_to_pb(min(of_name, key=_machine_key))

    async def _list_errors(self, request: pb.ListMemoryErrorsRequest) -> pb.ListMemoryErrorsResponse:
        checks = Checks()
        checks.vm(request.vm)
        checks.page_size(request.page_size, MAX_SIZE, DEFAULT_SIZE)
        checks.done()
        entries = sorted(await self._control.ledger(request.vm), key=_entry_key)
        try:
            page = paginate(entries, _entry_key, request.page_size, request.page_token, f"errors?{request.vm}")
        except PageTokenError as error:
            raise invalid("page_token", str(error)) from error
        return pb.ListMemoryErrorsResponse(
            errors=[wire.error_to_pb(entry) for entry in page.items], next_page_token=page.next_token
        )

    async def _report(self, request: pb.ReportMemoryErrorRequest) -> common_pb2.MemoryError:
        checks = Checks()
        checks.vm(request.vm)
        lsb = checks.memory_error(request.gpa, request.lsb)
        checks.done()
        return wire.error_to_pb(await self._control.report_error(request.vm, request.gpa, lsb))

    async def _watch(self, request: pb.WatchMemoryErrorsRequest) -> AsyncIterator[tuple[int, str, LedgerEntry]]:
        checks = Checks()
        checks.vm(request.vm, optional=True)
        checks.revision(request.after_revision)
        checks.done()
        async for change in self._control.watch_errors(request.vm, request.after_revision):
            yield change


def _machine_key(machine: Machine) -> str:
    """Orders machines by name. Of two with one name (a move within the host) the running or leaving one is first."""
    return f"{machine.vm}\0{machine.state in (MachineState.INCOMING, MachineState.MIGRATING_IN):d}"


def _entry_key(entry: LedgerEntry) -> str:
    return f"{entry.gpa:016x}"


def _check_page(page_size: int) -> None:
    checks = Checks()
    checks.page_size(page_size, MAX_SIZE, DEFAULT_SIZE)
    checks.done()


def _check_vm(vm: str) -> None:
    checks = Checks()
    checks.vm(vm)
    checks.done()
