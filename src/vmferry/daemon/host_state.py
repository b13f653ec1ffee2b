"""The service's state for the ops endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vmferry.aio.wall_clock import now_us
from vmferry.errors import Reason, VmferryError
from vmferry.migration.inventory import Machine
from vmferry.migration.service import MigrationService
from vmferry.model.journal import JournalEntry
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.migration import Incoming, Job
from vmferry.ops.state import EventView, MachineView, SecurityView, State

EVENTS_SHOWN = 100
JOURNALS_READ = 20
"""The events of this many migrations are shown, the newest."""


class HostState:
    """The state of this host: `ops.state.StateSource`."""

    def __init__(self, host: str, service: MigrationService, security: Callable[[], SecurityView]) -> None:
        self._host = host
        self._security = security
        self._service = service

    async def state(self) -> State:
        machines = await self._service.machines()
        jobs = await self._service.jobs()
        incomings = await self._service.incomings()
        vms = sorted({machine.vm for machine in machines} | {job.vm for job in jobs} | {one.vm for one in incomings})
        return State(
            host=self._host,
            at_us=now_us(),
            machines=tuple(_view(machine) for machine in machines),
            jobs=tuple(jobs),
            incomings=tuple(incomings),
            ledgers={vm: await self._ledger(vm) for vm in vms if vm},
            events=await self._events(jobs, incomings),
            security=self._security(),
        )

    async def _ledger(self, vm: str) -> tuple[LedgerEntry, ...]:
        try:
            return tuple(await self._service.ledger(vm))
        except VmferryError as error:
            if error.reason is Reason.VM_UNKNOWN:
                return ()
            raise

    async def _events(self, jobs: Sequence[Job], incomings: Sequence[Incoming]) -> tuple[EventView, ...]:
        newest, arrived = jobs[-JOURNALS_READ:], incomings[-JOURNALS_READ:]
        names = {job.migration for job in newest} | {incoming.migration for incoming in arrived}
        entries: list[JournalEntry] = []
        for name in names:
            entries += await self._service.events(name)
        entries.sort(key=lambda entry: -entry.at_us)
        return tuple(
            EventView(entry.at_us, entry.migration, entry.kind, _words(entry.data.items()))
            for entry in entries[:EVENTS_SHOWN]
        )


def _words(data: Iterable[tuple[str, object]]) -> str:
    """`key value` for each value that is short enough to read."""
    return ", ".join(f"{key} {value}" for key, value in data if isinstance(value, str | int | float) and value != "")


def _view(machine: Machine) -> MachineView:
    return MachineView(
        vm=machine.vm,
        state=machine.state,
        vcpus=machine.vcpus,
        platform=machine.platform,
        memory_bytes=sum(region.size for region in machine.layout.regions),
        vmm_pid=machine.vmm_pid,
        migration=machine.migration,
        progress=machine.progress,
    )
