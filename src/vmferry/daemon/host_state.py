"""The service's state for the ops endpoint, and the problems of this host for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmferry.aio.wall_clock import now_us
from vmferry.migration.inventory import Machine
from vmferry.migration.service import MigrationService
from vmferry.model.problems import Problem, UnfitHost, problems
from vmferry.ops.state import Check, EventView, MachineView, SecurityView, State

EVENTS_SHOWN = 50
ENDED_SHOWN = 20
ENDED_LOOKED_AT = 100
"""The newest ended migrations among which problems of the last hour are looked for."""


class HostState:
    """The state of this host: `ops.state.StateSource` and `api.control.ProblemControl`."""

    def __init__(self, host: str, service: MigrationService, security: Callable[[], SecurityView]) -> None:
        self._host = host
        self._security = security
        self._service = service
        self._unfit: tuple[UnfitHost, ...] = ()
        self._unfit_since_us = 0

    def note_checks(self, checks: Sequence[Check]) -> None:
        unfit = tuple(UnfitHost(check.name, check.detail) for check in checks if not check.ok)
        if unfit and not self._unfit:
            self._unfit_since_us = now_us()
        self._unfit = unfit

    async def problems(self) -> Sequence[Problem]:
        moves = [*await self._service.moves.moving(), *self._service.moves.ended(ENDED_LOOKED_AT)]
        return problems(self._host, moves, self._unfit, self._unfit_since_us, now_us())

    async def state(self) -> State:
        machines = await self._service.machines()
        moves = self._service.moves
        events = await moves.newest_events(EVENTS_SHOWN)
        return State(
            host=self._host,
            at_us=now_us(),
            machines=tuple(_view(machine) for machine in machines),
            moving=tuple(await moves.moving()),
            ended=tuple(moves.ended(ENDED_SHOWN)),
            ended_count=moves.ended_count(),
            ledgers={one.vm: tuple(await self._service.ledger_of_known(one.vm)) for one in machines if one.vm},
            events=tuple(EventView(one.at_us, name, one.kind, one.words, one.host) for name, one in events),
            problems=tuple(await self.problems()),
            totals=await moves.totals(),
            security=self._security(),
        )


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
