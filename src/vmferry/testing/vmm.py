# ruff: noqa: ARG002 a fake has the parameters of its port
"""VMMs without memory. They keep the requests they received and whether their vCPUs run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing, MemoryKind, MemoryLayout, MemoryRegion
from vmferry.model.vmm import VmmIdentity
from vmferry.testing.script import Script
from vmferry.units import MIB, PAGE_4K, Gpa

LAYOUT = MemoryLayout((MemoryRegion(Gpa(0), 64 * MIB, PAGE_4K, Backing.MEMFD),))


def identity(vm: str, state: str = "running", pid: int = 100, platform: str = "x86_64/process") -> VmmIdentity:
    """The identity in a VMM's hello. A waiting VMM has no memory yet."""
    waits = state == "incoming"
    layout, vcpus = (MemoryLayout(()), 0) if waits else (LAYOUT, 2)
    return VmmIdentity(vm, pid, platform, vcpus, layout, frozenset({"source", "destination"}), state)


class FakeVmm:
    """A fake VMM. Its steps are `vmm.METHOD`. `gone` returns after `die`."""

    def __init__(self, who: VmmIdentity, script: Script) -> None:
        self._identity = who
        self.script = script
        self._died = asyncio.Event()
        self._in_turn = asyncio.Lock()
        self._why = ""

    @property
    def identity(self) -> VmmIdentity:
        return self._identity

    @property
    def alive(self) -> bool:
        return not self._died.is_set()

    @property
    def runs(self) -> bool:
        """Whether vCPUs run."""
        return self.alive and self._identity.state == "running"

    def make_memory_of(self, kind: MemoryKind) -> None:
        """Sets the memory that its `hello` announced."""
        self._identity = replace(self._identity, memory=kind)

    def make_layout_of(self, backing: Backing) -> None:
        """Sets the backing of all of its memory."""
        regions = tuple(replace(region, backing=backing) for region in self._identity.layout.regions)
        self._identity = replace(self._identity, layout=MemoryLayout(regions))

    def may_have_state_of(self, size: int) -> None:
        """Sets the most bytes of a device state that its `hello` announced."""
        self._identity = replace(self._identity, state_bytes=size)

    def die(self, why: str = "killed") -> None:
        self._why = why
        self._died.set()

    async def attach_memory(self, socket: Path) -> None:
        await self._do("attach_memory", ("running", "stopped"), "")

    async def stop(self) -> None:
        await self._do("stop", ("running",), "stopped")

    async def save_state(self) -> bytes:
        await self._do("save_state", ("stopped",), "")
        return b"state of " + self._identity.vm.encode()

    async def resume(self) -> None:
        await self._do("resume", ("stopped",), "running")

    async def abandon(self) -> None:
        await self._do("abandon", ("stopped",), "gone")
        self.die("abandoned")

    async def prepare(self, layout: MemoryLayout, vcpus: int, uffd_features: Sequence[str], socket: Path) -> None:
        def made() -> None:
            self._identity = replace(self._identity, layout=layout, vcpus=vcpus)

        await self._do("prepare", ("incoming",), "prepared", made)

    async def load_state(self, state: bytes) -> None:
        await self._do("load_state", ("prepared",), "loaded")

    async def start(self) -> None:
        await self._do("start", ("loaded",), "running")

    async def migration_complete(self, keep_uffd: bool) -> None:
        await self._do(f"migration_complete {keep_uffd}", ("running",), "")

    async def reset(self) -> None:
        def forgotten() -> None:
            self._identity = replace(self._identity, layout=MemoryLayout(()), vcpus=0)

        await self._do("reset", ("prepared", "loaded"), "incoming", forgotten)

    async def gone(self) -> str:
        await self._died.wait()
        return self._why

    async def _do(
        self, name: str, required: tuple[str, ...], state: str, effect: Callable[[], None] = lambda: None
    ) -> None:
        """Performs one request after the other. A request whose end state is reached is done: it is safe to repeat."""
        async with self._in_turn:
            await self._carry_out(name, required, state, effect)

    async def _carry_out(self, name: str, required: tuple[str, ...], state: str, effect: Callable[[], None]) -> None:
        self._must_live()
        if self._identity.state not in (*required, state):
            actual = self._identity.state
            raise VmferryError(Reason.VMM_REFUSED, f"{name}: state is {actual}, must be one of {required}.")

        def apply() -> None:
            self._must_live()
            if state and self._identity.state != state:
                effect()
                self._identity = replace(self._identity, state=state)

        await self.script.do(f"vmm.{name}", apply)

    def _must_live(self) -> None:
        if not self.alive:
            raise VmferryError(Reason.VMM_GONE, f"the VMM of {self._identity.vm} is gone: {self._why}.")


class FakeVmms:
    """The VMMs of one host. They outlive the daemon; a dead VMM is not connected."""

    def __init__(self) -> None:
        self.everyone: list[FakeVmm] = []

    def add(self, vmm: FakeVmm) -> FakeVmm:
        self.everyone.append(vmm)
        return vmm

    def running(self, vm: str) -> FakeVmm | None:
        return self._in(vm, "running") or self._in(vm, "stopped")

    def incoming(self, vm: str) -> FakeVmm | None:
        return self._in(vm, "incoming", "prepared", "loaded")

    def all(self) -> Sequence[FakeVmm]:
        return [vmm for vmm in self.everyone if vmm.alive]

    def _in(self, vm: str, *states: str) -> FakeVmm | None:
        return next((one for one in self.all() if one.identity.vm == vm and one.identity.state in states), None)
