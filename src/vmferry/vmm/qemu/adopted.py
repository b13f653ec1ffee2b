"""A QEMU that vmferry has adopted: its monitor, its process, and the commands that both sides of a move need."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu.facts import MigrationInfo, StatusInfo
from vmferry.vmm.qemu.mark import Marks
from vmferry.vmm.qemu.memory_link import attach, handover
from vmferry.vmm.qemu.monitor import AddedFd, Monitor
from vmferry.vmm.qemu.reach import Process, Reach, close_all
from vmferry.vmm.qemu.survey import Survey, Surveyor
from vmferry.vmm.session import VmmDeadlines

log = structlog.get_logger()

NOT_ANNOUNCED = "qemu.not_announced"
ENDS = ("completed", "failed", "cancelled")
LOOK_S = 0.001
"""Between two looks at a migration's state."""
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""Milliseconds: QEMU's own defaults after a migration."""


@dataclass(slots=True)
class Adopted:
    """The parts of one adopted QEMU. `within_s`: the deadline of a command that only reads."""

    vm: str
    monitor: Monitor
    reach: Reach
    process: Process
    deadlines: VmmDeadlines
    within_s: float
    attached: Path | None = None
    """The pager's socket that has the memory."""
    marks: Marks = field(init=False)

    def __post_init__(self) -> None:
        self.marks = Marks(self.monitor, self.within_s)

    async def ask(self, command: str, within_s: float | None = None, **arguments: object) -> Any:
        return await self.monitor.ask(command, within_s or self.within_s, arguments)

    async def survey(self, open_files: int = pb.OPEN_BACKING_UNSPECIFIED) -> Survey:
        return await Surveyor(self.monitor, self.reach, self.within_s).facts(self.process, open_files)

    async def status(self) -> str:
        return (await self.monitor.ask_for(StatusInfo, "query-status", self.within_s)).status

    async def migration(self) -> MigrationInfo:
        return await self.monitor.ask_for(MigrationInfo, "query-migrate", self.within_s)

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await self.ask("migrate-set-capabilities", capabilities=wanted)

    async def until_migrated(self, within_s: float) -> None:
        """Waits for the end of a migration. Raises: VmferryError VMM_REFUSED, VMM_TIMEOUT, VMM_GONE."""
        try:
            async with asyncio.timeout(within_s):
                while (info := await self.migration()).status not in ENDS:  # noqa: ASYNC110 QEMU's, not ours
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as error:
            raise self.error(Reason.VMM_TIMEOUT, f"did not finish with its state within {within_s:g} s") from error
        if info.status != "completed":
            raise self.error(Reason.VMM_REFUSED, f"{info.status} with its state: {info.error_desc or 'see its log'}")

    async def until_status(self, wanted: str, within_s: float) -> None:
        """Raises: VmferryError VMM_TIMEOUT, VMM_GONE."""
        status = ""
        try:
            async with asyncio.timeout(within_s):
                while (status := await self.status()) != wanted:  # noqa: ASYNC110 QEMU's, not ours
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as error:
            raise self.error(Reason.VMM_TIMEOUT, f"is {status!r}, not {wanted!r}, after {within_s:g} s") from error

    async def give_fd(self, fd: int) -> AddedFd:
        """The descriptor as a set of QEMU's, reached as /dev/fdset/N."""
        return await self.monitor.add_fd(fd, "vmferry", self.within_s)

    async def take_fd_back(self, added: AddedFd) -> None:
        with suppress(VmferryError):
            await self.ask("remove-fd", **{"fdset-id": added.fdset_id})

    async def attach(self, socket: Path, role: str, survey: Survey, *uffd: int) -> None:
        """Hands the memory to the pager and waits for its answer."""
        if self.attached == socket:
            return
        message = handover(survey.facts, self.vm, role, len(survey.files))
        descriptors = [*survey.files, self.process.pidfd, *uffd]
        await attach(socket, message, descriptors, self.deadlines.attach_memory_s)
        self.attached = socket

    async def announce(self) -> None:
        """Tells switches where the VM is. It may fail: some machines have no network."""
        try:
            await self.ask("announce-self", **ANNOUNCE)
        except VmferryError as error:
            log.info(NOT_ANNOUNCED, vm=self.vm, error=str(error))

    async def end_process(self) -> None:
        """`quit`; a QEMU that waits for a page does not read it, and is killed."""
        try:
            await self.ask("quit")
        except VmferryError as error:
            if error.reason is Reason.VMM_TIMEOUT:
                self._kill()

    def _kill(self) -> None:
        """Raises: VmferryError VMM_REFUSED."""
        try:
            signal.pidfd_send_signal(self.process.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except OSError as error:
            raise VmferryError(
                Reason.VMM_REFUSED,
                f"QEMU of {self.vm} (pid {self.process.pid}) does not answer and cannot be killed: {error}.",
                "End it by hand; vmferryd needs CAP_KILL for a QEMU of another user.",
            ) from error

    def close(self) -> None:
        os.close(self.process.pidfd)

    def error(self, reason: Reason, what: str) -> VmferryError:
        return VmferryError(reason, f"QEMU of {self.vm} (pid {self.process.pid}) {what}.", "Look at QEMU's log.")


def close_survey(survey: Survey) -> None:
    close_all(survey.files)
