"""What a QEMU does as the source of a move.

```
 attach ─▶ stop ─▶ save ─▶ abandon (quit)
             └──────┴───▶ resume (cont)
```
From QEMU 8.2 on the state is that of `xen-save-devices-state`, completed here; older ones `migrate` with
`x-ignore-shared`, since they give no addresses of small blocks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.errors import Reason, VmferryError
from vmferry.v1 import reach_pb2 as pb
from vmferry.vmm.qemu import stream
from vmferry.vmm.qemu.adopted import Adopted, close_survey
from vmferry.vmm.qemu.facts import Facts, MigrationParameters
from vmferry.vmm.qemu.findings import refuse_if_any, source_findings
from vmferry.vmm.qemu.mark import Mark
from vmferry.vmm.qemu.memory_map import RamBlock, ram_blocks
from vmferry.vmm.qemu.monitor import AddedFd

UNLIMITED = 1 << 40
"""Bytes a second, for the small blocks of `migrate`."""
STATE_FD = "vmferry-state"
_SAVES_AGAIN = ("paused", "postmigrate")


@dataclass(frozen=True, slots=True)
class _Sink:
    """A memfd that QEMU writes its state to, and the descriptor set that names it there."""

    memory: int
    added: AddedFd


class QemuSource:
    """The source side of one QEMU; its owner calls one method at a time."""

    def __init__(self, qemu: Adopted) -> None:
        self._qemu = qemu
        self._facts: Facts | None = None
        self._state: bytes | None = None
        self._limit: int | None = None
        self._resumed = False
        """Whether vCPUs have run since `stop`."""
        qemu.monitor.on_event(self._hear)
        self.may_be_stopped = False
        """Whether `stop` was sent, with any answer or none, and no `cont` after it."""
        self._sink: _Sink | None = None

    async def attach(self, socket: Path) -> None:
        """Checks that the VM can be moved, and hands its memory to the pager."""
        await self._check_runs()
        survey = await self._qemu.survey(pb.OPEN_BACKING_READ)
        try:
            refuse_if_any(self._qemu.vm, source_findings(survey.facts))
            await self._qemu.attach(socket, "source", survey)
        finally:
            close_survey(survey)
        self._facts = survey.facts

    async def stop(self) -> None:
        """Stops the vCPUs. A VM that its operator has paused stays so: started elsewhere, it would run."""
        mark = await self._qemu.marks.read()
        if mark is None or mark.stage != "stopped":
            await self._check_runs()
        self._state = None
        try:
            await self._qemu.marks.replace(Mark("stopped"))
            await self._open_sink()
        except VmferryError:
            with suppress(VmferryError):
                await self._qemu.marks.replace(None)
            raise
        self.may_be_stopped = True
        await self._qemu.ask("stop", self._qemu.deadlines.stop_s)
        status = await self._qemu.status()
        if status not in _SAVES_AGAIN:
            raise self._qemu.error(Reason.VMM_REFUSED, f"is {status!r} after it was stopped, not paused")
        self._resumed = False

    async def save(self) -> bytes:
        """The device state as a stream that any QEMU loads. Repeated, it gives the same."""
        if self._state is None:
            facts = self._facts or await self._look()
            try:
                if facts.machine.tells_addresses:
                    self._state = await self._save_devices(facts)
                else:
                    self._state = await self._migrate()
            except stream.StreamError as error:
                raise self._qemu.error(Reason.VMM_PROTOCOL, f"saved a state that is not known: {error}") from error
            if self._resumed:
                self._state = None
                raise self._qemu.error(Reason.VMM_REFUSED, "was started by somebody in the blackout")
        return self._state

    async def resume(self) -> None:
        """The VM continues here."""
        self._state = None
        await self._qemu.ask("cont", self._qemu.deadlines.resume_s)
        if await self._qemu.status() != "running":
            raise self._qemu.error(Reason.VMM_REFUSED, f"is {await self._qemu.status()!r} after `cont`")
        self.may_be_stopped = False
        await self._qemu.marks.replace(None)
        if self._sink is not None:
            await self._qemu.take_fd_back(self._sink.added)
            self.close()
        await self._restore_limit()
        await self._qemu.announce()

    async def abandon(self) -> None:
        """The VM has moved away."""
        await self._qemu.end_process()
        self.close()

    def close(self) -> None:
        """Closes the files of this process; QEMU stays as it is."""
        sink, self._sink = self._sink, None
        if sink is not None:
            os.close(sink.memory)

    def _hear(self, event: str, _data: Mapping[str, Any]) -> None:
        self._resumed = self._resumed or event == "RESUME"

    async def _check_runs(self) -> None:
        """Raises: VmferryError VM_NOT_RUNNING."""
        if (status := await self._qemu.status()) != "running":
            raise VmferryError(
                Reason.VM_NOT_RUNNING,
                f"QEMU of {self._qemu.vm} (pid {self._qemu.process.pid}) is {status!r}, not running.",
                "Move it once it runs (`cont`).",
            )

    async def _look(self) -> Facts:
        survey = await self._qemu.survey()
        close_survey(survey)
        return survey.facts

    async def _save_devices(self, facts: Facts) -> bytes:
        saved = await self._xen_save()
        devices = stream.paused(stream.devices_of_save(saved))
        now = ram_blocks(await self._qemu.monitor.human("info ramblock", self._qemu.within_s))
        small = [now[block.name] for block in facts.small_blocks if block.name in now]
        return stream.encode(facts.machine.machine_type, self._contents(small), devices)

    async def _xen_save(self) -> bytes:
        sink = await self._open_sink()
        os.ftruncate(sink.memory, 0)
        name = f"/dev/fdset/{sink.added.fdset_id}"
        await self._qemu.ask("xen-save-devices-state", self._qemu.deadlines.save_state_s, filename=name)
        return os.pread(sink.memory, os.fstat(sink.memory).st_size, 0)

    async def _open_sink(self) -> _Sink:
        """Made before the vCPUs stop: each command of the blackout counts."""
        if self._sink is None:
            memory = os.memfd_create("vmferry-state", os.MFD_CLOEXEC)
            try:
                # QEMU compares access modes and truncates: neither a pipe nor a descriptor that may also read will do.
                writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    self._sink = _Sink(memory, await self._qemu.give_fd(writable))
                finally:
                    os.close(writable)
            except BaseException:
                os.close(memory)
                raise
        return self._sink

    def _contents(self, blocks: Sequence[RamBlock]) -> list[stream.Block]:
        """The small blocks, read in the process. Raises: VmferryError VMM_REFUSED."""
        found = []
        try:
            memory = os.open(f"/proc/{self._qemu.process.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            try:
                for block in blocks:
                    assert block.hva is not None, "this version tells addresses"
                    contents = os.pread(memory, block.used, block.hva)
                    if len(contents) != block.used:
                        raise OSError(f"{len(contents)} of {block.used} bytes")
                    found.append(stream.Block(block.name, contents))
            finally:
                os.close(memory)
        except OSError as error:
            what = f"has RAM block {block.name} that cannot be read: {error}"
            raise self._qemu.error(Reason.VMM_REFUSED, what) from error
        return found

    async def _migrate(self) -> bytes:
        qemu = self._qemu
        await qemu.set_capabilities({"x-ignore-shared": True})
        parameters = await qemu.monitor.ask_for(MigrationParameters, "query-migrate-parameters", qemu.within_s)
        self._limit = parameters.max_bandwidth
        await qemu.ask("migrate-set-parameters", **{"max-bandwidth": UNLIMITED})
        memory = os.memfd_create("vmferry-state", os.MFD_CLOEXEC)
        try:
            await qemu.monitor.get_fd(memory, STATE_FD, qemu.within_s)
            await qemu.ask("migrate", uri=f"fd:{STATE_FD}")
            await qemu.until_migrated(qemu.deadlines.save_state_s)
            await qemu.until_status("postmigrate", qemu.deadlines.save_state_s)  # before it `cont` does nothing
            data = os.pread(memory, os.fstat(memory).st_size, 0)
        finally:
            os.close(memory)
        whole = stream.decode(data)
        return stream.encode(whole.machine, whole.blocks, stream.paused(whole.devices))

    async def _restore_limit(self) -> None:
        if self._limit is None:
            return
        try:
            await self._qemu.ask("migrate-set-parameters", **{"max-bandwidth": self._limit})
            await self._qemu.set_capabilities({"x-ignore-shared": False})
        except VmferryError as error:
            if error.reason is Reason.VMM_GONE:
                raise
        self._limit = None
