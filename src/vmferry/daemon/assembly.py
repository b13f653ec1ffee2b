"""The wiring: the only place where store, VMMs, pagers and peers meet the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager

from vmferry.daemon import deadlines
from vmferry.daemon.config import Config
from vmferry.daemon.host_state import HostState
from vmferry.daemon.memory_room import HostRooms
from vmferry.daemon.processors import HostProcessors
from vmferry.daemon.security import Security
from vmferry.migration.destination.incoming_service import IncomingService
from vmferry.migration.environment import Environment, History, SystemClock, UncheckedProcessors
from vmferry.migration.move_book import MoveBook
from vmferry.migration.service import MigrationService
from vmferry.model.memory_error import LedgerEntry
from vmferry.pager.process import PagerProcesses, locate
from vmferry.pager.settings import LaneSettings, PagerSettings
from vmferry.peer.client import GrpcPeers
from vmferry.ports import Store
from vmferry.store.sqlite import open_store
from vmferry.vmm.every import EveryVmm
from vmferry.vmm.qemu.monitors import QemuMonitors
from vmferry.vmm.qemu.reach import ReachProgram
from vmferry.vmm.qemu.template import QemuTemplate
from vmferry.vmm.server import VmmCallbacks, VmmServer


class HostCore:
    """The service and its adapters: `core.Core`."""

    def __init__(self, config: Config, store: Store, security: Security) -> None:
        clock, limits = SystemClock(), config.timeouts
        self._vmms = VmmServer(
            config.vmm_socket,
            VmmCallbacks(self._record, on_guest_reset=self._guest_was_reset),
            clock.now_us,
            deadlines.vmm(limits),
        )
        reach = ReachProgram(lambda: locate(config.qemu.reach_program, "[qemu] reach_program"), limits.vmm_s)
        self._qemus = QemuMonitors(
            config.qemu.monitors,
            config.state_dir / "qemus.json",
            reach,
            deadlines.vmm(limits),
            others=self._vmms,
            tell_reset=self._guest_was_reset,
        )
        vmms = EveryVmm(self._vmms, self._qemus)
        self._vmms.share_names_with(self._qemus)
        self.pagers = PagerProcesses(config.runtime_dir, config.pager.program, pager_settings(config))
        self._service = MigrationService(
            Environment(
                host=config.host,
                store=store,
                vmms=vmms,
                starter=QemuTemplate(config.qemu.template, vmms, limits.vmm_s),
                pagers=self.pagers,
                peers=GrpcPeers(config.host, deadlines.peer(limits), security.identity, security.refusals),
                clock=clock,
                memory_rooms=HostRooms(),
                timeouts=deadlines.migration(limits),
                push_bytes_per_s=config.pager.push_bytes_per_s,
                history=History(config.history.keep_days * 86400.0, config.history.keep_migrations),
                processors=HostProcessors() if config.keep_awake else UncheckedProcessors(),
            )
        )
        self._state = HostState(config.host, self._service, security.view)

    @property
    def migrations(self) -> MigrationService:
        return self._service

    @property
    def moves(self) -> MoveBook:
        return self._service.moves

    @property
    def machines(self) -> MigrationService:
        return self._service

    @property
    def qemus(self) -> QemuMonitors:
        return self._qemus

    @property
    def incoming(self) -> IncomingService:
        return self._service.incoming

    @property
    def state(self) -> HostState:
        return self._state

    def services(self) -> Mapping[str, Coroutine[object, object, None]]:
        return {"vmms": self._vmms.serve(), "qemus": self._qemus.run(), "migrations": self._run()}

    async def started(self) -> None:
        await self._vmms.listening.wait()
        await self._service.recovered.wait()

    async def drain(self, limit_s: float, hurry: asyncio.Event) -> None:
        """`limit_s` bounds the service's own stop as well (`Timeouts.stop_s`); this limit ends a stop that hangs."""
        stopping = asyncio.create_task(self._service.stop(), name="drain")
        hurried = asyncio.create_task(hurry.wait(), name="hurry")
        try:
            await asyncio.wait({stopping, hurried}, timeout=limit_s + 1.0, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, hurried):
                task.cancel()
            await asyncio.gather(stopping, hurried, return_exceptions=True)

    async def _run(self) -> None:
        """Recovers the state of an earlier daemon and runs jobs until it is cancelled. Pagers outlive it."""
        await self._vmms.listening.wait()
        async with self._service:
            await asyncio.Event().wait()

    async def _record(self, vm: str, entries: Sequence[LedgerEntry]) -> None:
        await self._service.record_vmm_errors(vm, entries)

    async def _guest_was_reset(self, vm: str) -> None:
        await self._service.guest_was_reset(vm)


def pager_settings(config: Config) -> PagerSettings:
    """The configured settings of every pager."""
    return PagerSettings(
        lanes=LaneSettings(
            listen_ip=config.pages.ip,
            ports=config.pages.ports,
            demand_timeout_s=config.pages.demand_timeout_s,
            push_lanes=config.pager.push_lanes,
        ),
        deadlines=deadlines.pager(config.timeouts),
        tuning=config.pager.tuning,
    )


@asynccontextmanager
async def assemble(config: Config, security: Security) -> AsyncIterator[HostCore]:
    """Opens the store and makes the parts. Raises: VmferryError STORE_FAILED."""
    store = await open_store(config.database)
    try:
        core = HostCore(config, store, security)
        try:
            yield core
        finally:
            await core.pagers.close()
    finally:
        await store.close()
