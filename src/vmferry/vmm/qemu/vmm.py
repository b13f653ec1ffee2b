"""A QEMU as a VMM: implements `ports.Vmm` over its source and its destination side.

Requests are carried out one after the other, as a VMM that speaks the VMM protocol does. The state is that protocol's;
a mark in QEMU keeps it over a restart of the daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryLayout
from vmferry.model.vmm import VmmIdentity
from vmferry.vmm.qemu.adopted import Adopted, close_survey
from vmferry.vmm.qemu.destination import QemuDestination
from vmferry.vmm.qemu.facts import Facts, Profile
from vmferry.vmm.qemu.findings import Finding, destination_findings, source_findings
from vmferry.vmm.qemu.mark import vm_state
from vmferry.vmm.qemu.source import QemuSource

Result = TypeVar("Result")

ABILITIES = frozenset({"source", "destination"})
_NOTHING = MemoryLayout(())


@dataclass(frozen=True, slots=True)
class QemuCheck:
    """The answer of `check`. `command`: the command line of this QEMU."""

    profile: Profile
    findings: Sequence[Finding]
    command: Sequence[str]


class QemuVmm:
    """Made by `adopt`."""

    def __init__(self, qemu: Adopted, identity: VmmIdentity) -> None:
        self._qemu = qemu
        self._identity = identity
        self._source = QemuSource(qemu)
        self._destination = QemuDestination(qemu)
        self._in_turn = asyncio.Lock()
        self._announcing: asyncio.Task[None] | None = None

    @classmethod
    async def adopt(cls, qemu: Adopted) -> QemuVmm:
        """Looks at a QEMU. Raises: VmferryError VM_NOT_RUNNING where the VM is in no state that vmferry may change."""
        mark, status = await qemu.marks.read(), await qemu.status()
        state = vm_state(status, mark)
        if state is None:
            raise VmferryError(
                Reason.VM_NOT_RUNNING,
                f"QEMU of {qemu.vm} (pid {qemu.process.pid}) is {status!r}: it neither runs nor waits for a VM.",
                "It is adopted once it runs.",
            )
        if mark is not None and mark.stage == "stopped" and state == "running":
            await qemu.marks.replace(None)  # left by a move that failed while no daemon was connected
        survey = await qemu.survey()
        close_survey(survey)
        return cls(qemu, _identity(qemu, survey.facts, state))

    @property
    def identity(self) -> VmmIdentity:
        return self._identity

    # source

    async def attach_memory(self, socket: Path) -> None:
        await self._do("attach_memory", ("running", "stopped"), "", lambda: self._source.attach(socket))

    async def stop(self) -> None:
        await self._do("stop", ("running",), "stopped", self._source.stop)

    async def save_state(self) -> bytes:
        return await self._do("save_state", ("stopped",), "", self._source.save) or b""

    async def resume(self) -> None:
        """Also after a `stop` without an answer."""
        if self._source.may_be_stopped and self._identity.state == "running":
            self._identity = replace(self._identity, state="stopped")
        await self._do("resume", ("stopped",), "running", self._source.resume)

    async def abandon(self) -> None:
        await self._do("abandon", ("stopped",), "gone", self._source.abandon)

    # destination

    async def prepare(self, layout: MemoryLayout, vcpus: int, uffd_features: Sequence[str], socket: Path) -> None:
        async def work() -> None:
            await self._destination.prepare(layout, vcpus, uffd_features, socket)
            self._identity = replace(self._identity, layout=layout, vcpus=vcpus)

        await self._do("prepare", ("incoming",), "prepared", work)

    async def load_state(self, state: bytes) -> None:
        async def work() -> None:
            try:
                await self._destination.load(state)
            except BaseException:
                self._identity = replace(self._identity, state="loaded")  # it takes no other: only `reset` may come
                raise

        await self._do("load_state", ("prepared",), "loaded", work)

    async def start(self) -> None:
        await self._do("start", ("loaded",), "running", self._destination.start)
        self._announcing = asyncio.create_task(self._qemu.announce(), name=f"qemu.announce {self._identity.vm}")

    async def migration_complete(self, keep_uffd: bool) -> None:
        await self._do("migration_complete", ("running",), "", lambda: self._destination.complete(keep_uffd))

    async def reset(self) -> None:
        async def work() -> None:
            await self._destination.reset(self._identity.state == "loaded")
            self._identity = replace(self._identity, state="incoming", layout=_NOTHING, vcpus=0)

        await self._do("reset", ("prepared", "loaded", "incoming"), "", work)

    async def check(self) -> QemuCheck:
        """Whether this VM can be moved, or taken. Changes nothing."""
        survey = await self._qemu.survey()
        close_survey(survey)
        waits = self._identity.state == "incoming"
        findings = destination_findings(survey.facts) if waits else source_findings(survey.facts)
        return QemuCheck(survey.facts.profile, findings, command_line(self._qemu.process.pid))

    def resets(self) -> AbstractContextManager[asyncio.Queue[Mapping[str, Any]]]:
        """The resets of the guest from here on."""
        return self._qemu.monitor.events("RESET")

    async def gone(self) -> str:
        return await self._qemu.monitor.gone()

    async def close(self) -> None:
        """Lets go of QEMU, which stays as it is."""
        if self._announcing is not None:
            self._announcing.cancel()
        await self._qemu.monitor.close()
        self._source.close()
        self._qemu.close()

    async def _do(
        self, request: str, required: Sequence[str], end: str, work: Callable[[], Awaitable[Result]]
    ) -> Result | None:
        """One after the other. A request whose end state is reached is done."""
        async with self._in_turn:
            state = self._identity.state
            if end and state == end:
                return None
            if state not in required:
                needed = " or ".join(required)
                raise self._qemu.error(Reason.VMM_REFUSED, f"is {state}; {request} needs it {needed}")
            result = await work()
            if end:
                self._identity = replace(self._identity, state=end)
            return result


def _identity(qemu: Adopted, facts: Facts, state: str) -> VmmIdentity:
    waits = state == "incoming"
    return VmmIdentity(
        vm=qemu.vm,
        pid=qemu.process.pid,
        platform=facts.machine.platform,
        vcpus=0 if waits else len(facts.machine.vcpu_threads),
        layout=_NOTHING if waits else facts.layout,
        abilities=ABILITIES,
        state=state,
        memory=facts.memory_kind,
    )


def command_line(pid: int) -> list[str]:
    """Raises: VmferryError VMM_GONE."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError as error:
        raise VmferryError(Reason.VMM_GONE, f"QEMU's process {pid} has ended.") from error
    return words[:-1]
