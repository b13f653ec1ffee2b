"""The QEMUs of this host: finds their monitors, adopts them, and lets go of those that end. Implements `ports.Vmms`.

```
 paths ──appear──▶ connect ─▶ adopt ─▶ here ──gone──▶ tried again while the socket is there
                      └──────────┴─ not yet: tried again every RETRY_S
```
"""

from __future__ import annotations

import asyncio
import glob
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.model.names import is_vm_name
from vmferry.model.vmm import SLOT_OF_STATE
from vmferry.ports import Vmms
from vmferry.vmm.qemu.adopted import Adopted
from vmferry.vmm.qemu.facts import NameInfo
from vmferry.vmm.qemu.monitor import Monitor
from vmferry.vmm.qemu.reach import Process, Reach
from vmferry.vmm.qemu.survey import Surveyor
from vmferry.vmm.qemu.vmm import QemuCheck, QemuVmm
from vmferry.vmm.session import TellReset, VmmDeadlines

log = structlog.get_logger()

ADOPTED = "qemu.adopted"
LEFT = "qemu.left"
NOT_ADOPTED = "qemu.not_adopted"
NOT_REMEMBERED = "qemu.not_remembered"
RESET = "qemu.guest_reset"
RESET_NOT_TOLD = "qemu.guest_reset_not_told"

LOOK_S = 0.5
RETRY_S = 1.0
WITHIN_S = 5.0
"""For a monitor's command that only looks."""


class QemuMonitors:
    """Owner of every connection to a QEMU. `patterns`: of monitor sockets, with `*`; `others`: VMMs of
    the other kind. `remembered`: the file of monitors that were adopted by request. `tell_reset`: called when a guest
    was reset."""

    def __init__(
        self,
        patterns: Sequence[str],
        remembered: Path,
        reach: Reach,
        deadlines: VmmDeadlines,
        *,
        others: Vmms,
        tell_reset: TellReset,
    ) -> None:
        self._patterns = list(patterns)
        self._remembered = remembered
        self._reach = reach
        self._deadlines = deadlines
        self._others = others
        self._tell_reset = tell_reset
        self._names: dict[Path, str] = {}
        self._here: dict[Path, QemuVmm] = {}
        self._tasks: dict[Path, asyncio.Task[None]] = {}
        self._said: dict[Path, str] = {}
        self._requested: set[Path] = set()
        """Monitors that a request adopts at this moment: the watch leaves them alone."""

    def running(self, vm: str) -> QemuVmm | None:
        """The one that runs, else the one that is stopped."""
        return self._in_slot(vm, "running") or self._in_slot(vm, "stopped")

    def incoming(self, vm: str) -> QemuVmm | None:
        return self._in_slot(vm, "incoming")

    def all(self) -> Sequence[QemuVmm]:
        return tuple(self._here.values())

    async def run(self) -> None:
        """Watches until it is cancelled; then every QEMU is let go as it is."""
        try:
            self._names = {Path(path): vm for path, vm in self._read().items()}
            while True:
                await self._look()
                await asyncio.sleep(LOOK_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def adopt(self, path: Path, vm: str) -> QemuVmm:
        """Adopts one now. `vm`: its name here; "": its own. Raises: VmferryError with why it cannot be."""
        if path not in self._here:
            self._requested.add(path)
            try:
                adopted = await self._adopt(path, vm or self._names.get(path, ""))
            finally:
                self._requested.discard(path)
            self._names[path] = vm
            self._tasks[path] = asyncio.create_task(self._hold(path, adopted), name=f"qemu {path}")
        self._names.setdefault(path, vm)
        self._write()
        return self._here[path]

    async def check(self, vm: str) -> QemuCheck:
        """Raises: VmferryError VM_UNKNOWN."""
        found = next((one for one in self._here.values() if one.identity.vm == vm), None)
        if found is None:
            raise VmferryError(
                Reason.VM_UNKNOWN, f"No QEMU of {vm!r} is adopted here.", "`vmferry adopt --qmp SOCKET` adopts one."
            )
        return await found.check()

    def _read(self) -> dict[str, str]:
        """Adopted monitors and the names of their VMs; "": QEMU's own."""
        try:
            return msgspec.json.decode(self._remembered.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            log.warning(NOT_REMEMBERED, file=str(self._remembered), error=str(error))
            return {}

    def _write(self) -> None:
        """Raises: VmferryError STORE_FAILED."""
        new = self._remembered.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.encode({str(path): vm for path, vm in self._names.items()}))
            new.replace(self._remembered)
        except OSError as error:
            raise VmferryError(
                Reason.STORE_FAILED, f"{self._remembered} cannot be written: {error}.", "See the state directory."
            ) from error

    async def _look(self) -> None:
        found = await asyncio.to_thread(_matching, [*self._patterns, *map(glob.escape, map(str, self._names))])
        for path in found:
            if path not in self._requested and (path not in self._tasks or self._tasks[path].done()):
                self._tasks[path] = asyncio.create_task(self._keep(path), name=f"qemu {path}")
        for path in [path for path, task in self._tasks.items() if task.done() and path not in found]:
            del self._tasks[path]
            self._said.pop(path, None)

    async def _keep(self, path: Path) -> None:
        """Adopts the QEMU at `path`, holds it until it goes, and tries again later where it cannot be adopted."""
        try:
            adopted = await self._adopt(path, self._names.get(path, ""))
        except VmferryError as error:
            if self._said.get(path) != error.message:  # the same again says nothing new
                self._said[path] = error.message
                log.warning(NOT_ADOPTED, monitor=str(path), error=str(error))
            await asyncio.sleep(RETRY_S)
            return
        await self._hold(path, adopted)

    async def _adopt(self, path: Path, name: str) -> QemuVmm:
        """`name`: that of the VM here; "": its own."""
        monitor = await Monitor.connect(path, WITHIN_S)
        try:
            vm = _name(path, name or await self._own_name(monitor))
            process = Process.of(await Surveyor(monitor, self._reach, WITHIN_S).process_id())
            qemu = Adopted(vm, monitor, self._reach, process, self._deadlines, WITHIN_S)
            try:
                adopted = await QemuVmm.adopt(qemu)
                self._check_slot(adopted)
            except BaseException:
                qemu.close()
                raise
        except BaseException:
            await monitor.close()
            raise
        self._here[path] = adopted
        self._said.pop(path, None)
        identity = adopted.identity
        log.info(ADOPTED, vm=identity.vm, pid=identity.pid, state=identity.state, monitor=str(path))
        return adopted

    async def _own_name(self, monitor: Monitor) -> str:
        return (await monitor.ask_for(NameInfo, "query-name", WITHIN_S)).name

    def _check_slot(self, adopted: QemuVmm) -> None:
        identity = adopted.identity
        slot = SLOT_OF_STATE[identity.state]
        others = [*self.all(), *self._others.all()]
        if any(one.identity.vm == identity.vm and SLOT_OF_STATE.get(one.identity.state) == slot for one in others):
            raise VmferryError(
                Reason.VMM_REFUSED,
                f"Another VMM of {identity.vm} is {identity.state} on this host already.",
                "Give one of the two another name.",
            )

    async def _hold(self, path: Path, adopted: QemuVmm) -> None:
        watch = asyncio.create_task(self._tell_resets(adopted), name=f"resets {adopted.identity.vm}")
        try:
            why = await adopted.gone()
            log.info(LEFT, vm=adopted.identity.vm, pid=adopted.identity.pid, why=why)
        finally:
            watch.cancel()
            self._here.pop(path, None)
            await adopted.close()

    async def _tell_resets(self, adopted: QemuVmm) -> None:
        """QEMU says RESET once it has replaced bad pages, before vCPUs run again."""
        vm = adopted.identity.vm
        with adopted.resets() as resets:
            while True:
                await resets.get()
                log.info(RESET, vm=vm)
                try:
                    await self._tell_reset(vm)
                except VmferryError as error:
                    log.warning(RESET_NOT_TOLD, vm=vm, error=str(error))

    def _in_slot(self, vm: str, slot: str) -> QemuVmm | None:
        for one in self._here.values():
            if one.identity.vm == vm and SLOT_OF_STATE.get(one.identity.state) == slot:
                return one
        return None


def _matching(patterns: Sequence[str]) -> set[Path]:
    return {Path(one) for pattern in patterns for one in glob.glob(pattern)}  # noqa: PTH207 an absolute pattern


def _name(path: Path, vm: str) -> str:
    if is_vm_name(vm):
        return vm
    raise VmferryError(
        Reason.INVALID_ARGUMENT,
        f"The QEMU at {path} is named {vm!r}, which is no name of a VM.",
        "Start it with -name, or adopt it with --vm.",
    )
