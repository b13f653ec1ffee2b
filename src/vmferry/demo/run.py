"""The demo's course: two daemons, two VMMs, and a control plane that moves a guest between them."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console

from vmferry.client.api import Api
from vmferry.client.plain import enum_word
from vmferry.client.progress import ProgressView
from vmferry.client.refusal import ApiError
from vmferry.demo.admin import AdminError
from vmferry.demo.course import Cast, Course, Page, largest_page, pages_to_lose
from vmferry.demo.network import NamespacePair, Place, loopback_places
from vmferry.demo.options import DemoOptions, choose_accel
from vmferry.demo.patience import patient
from vmferry.demo.processes import to_the_end
from vmferry.demo.qemu.guest import QemuCasting, QemuGuest, monitors, movable
from vmferry.demo.qemu.program import PROGRAM, QemuProgram, chosen_qemu
from vmferry.demo.result import DemoResult
from vmferry.demo.stage import Host, Stage, StageError, until
from vmferry.units import PAGE_4K
from vmferry.v1.common_pb2 import ErrorOrigin, MemoryLayout
from vmferry.v1.migrations_pb2 import PHASE_COMPLETED

VM = "demo"
HOSTS = ("source", "destination")
REFUSES = (9, 0, 0)
"""From this version on QEMU refuses to migrate a guest that took a machine check."""
WARM_S = patient(60.0)
"""Time for the guest to pass through all of its memory once before it moves."""

Say = Callable[[str], None]


async def perform(options: DemoOptions, progress: Console, say: Say) -> DemoResult:
    """Runs the demo.

    Raises:
        VmferryError, ApiError: the stage did not come up, or the migration was refused; logs are kept.
    """
    accel, words = choose_accel(options.accel)
    if words and options.qemu is not None:
        raise StageError(words, "--qemu needs KVM: without it a poisoned page ends QEMU.")
    if words:
        say(words)
    namespaces = NamespacePair()
    stage = Stage(options.keep, options.tls)
    try:
        why = await namespaces.make()
        if why:
            say(f"No network namespaces here ({why}): both hosts are on loopback.")
        else:
            namespaces.enter()
        places = loopback_places() if why else namespaces.places()
        async with asyncio.timeout(options.time_limit_s), stage:
            result = await _Play(options, accel, stage, say).perform(places, progress)
            stage.kept = options.keep or not result.ok
    except TimeoutError:
        raise StageError(f"not done within {options.time_limit_s:g} s", f"Logs: {stage.root}") from None
    except (ApiError, StageError, AdminError) as error:
        error.remedy = f"{error.remedy} Logs: {stage.root}".strip()
        raise
    except asyncio.CancelledError:
        say(f"Interrupted. Logs: {stage.root}")
        raise
    finally:
        await to_the_end(namespaces.remove())
    return DemoResult(
        accel,
        "loopback" if why else "namespaces",
        result.migration,
        result.evidence,
        result.found_by,
        str(stage.root) if stage.kept else "",
    )


class _Play:
    """One run on an empty stage."""

    def __init__(self, options: DemoOptions, accel: str, stage: Stage, say: Say) -> None:
        self._options = options
        self._accel = accel
        self._stage = stage
        self._say = say

    async def perform(self, places: Sequence[Place], progress: Console) -> DemoResult:
        options, shape = self._options, self._options.shape
        cast = await self._cast(places)
        await self._stage.warm(cast.source, within_s=WARM_S)
        layout = (await cast.home.machine(VM)).layout
        before, during = self._pages(layout)
        course = Course(cast, shape.workload == "idle", options.real_frames)
        await course.poison_before(before)
        told = sum(tell for _, tell in before)
        self._say(f"{len(before)} pages are poisoned: {told} are reported to the daemon, it must find the others.")
        if isinstance(cast.source, QemuGuest) and before:
            await self._show_refusal(cast.source)
        with ProgressView(progress) as view:
            await course.move(VM, places[1].peer, during, view.show)
        turned_bad = len(course.bad_during) * PAGE_4K // largest_page(layout)
        if course.migration.phase == PHASE_COMPLETED and turned_bad < options.poison_during:
            self._say(f"{turned_bad} of {options.poison_during} pages turned bad before the source was gone.")
        if course.migration.phase == PHASE_COMPLETED:
            self._say("The guest passes through its memory once more.")
        evidence = await course.judge()
        found = Counter(enum_word(ErrorOrigin.DESCRIPTOR, error.origin).lower() for error in course.ledger)
        return DemoResult(self._accel, "", course.migration, evidence, dict(found))

    async def _cast(self, places: Sequence[Place]) -> Cast:
        stage, shape = self._stage, self._options.shape
        how = ", with TLS" if self._options.tls else ""
        self._say(f"Two daemons start on {places[0].peer} and {places[1].peer}{how}.")
        config = {name: {"qemu": monitors(stage, name)} if self._options.qemu is not None else {} for name in HOSTS}
        home, away = await asyncio.gather(
            *(stage.host(name, place, **config[name]) for name, place in zip(HOSTS, places, strict=True))
        )
        apis = await stage.api(home), await stage.api(away)
        runs = f"{self._accel}, {shape.memory >> 20} MiB, {shape.vcpus} vCPUs, {shape.workload}"
        if self._options.qemu is not None:
            return await self._qemus((home, away), apis, runs)
        source, destination = await asyncio.gather(
            stage.guest(VM, home, self._accel, shape), stage.guest(VM, away, self._accel, self._options.waiting)
        )
        self._say(f"A guest runs: {runs}.")
        return Cast(source, destination, *apis)

    def _program(self) -> QemuProgram:
        """Raises: StageError."""
        asked = self._options.qemu or ""
        if program := chosen_qemu(asked):
            return program
        raise StageError(f"There is no {asked or PROGRAM} that runs.", "As root: apt-get install qemu-system-x86")

    async def _qemus(self, hosts: tuple[Host, Host], apis: tuple[Api, Api], runs: str) -> Cast:
        program = self._program()
        shape = movable(program, self._options.shape)
        if shape != self._options.shape:
            self._say(f"{program.name} can save shared memory only: the guest gets --backing memfd.")
        casting = await QemuCasting.prepare(self._stage, program, VM, shape)
        source = await casting.start(hosts[0], apis[0])
        destination = await casting.start(hosts[1], apis[1], incoming=True, backing=self._options.waiting.backing or "")
        self._say(f"An unmodified {program.name} runs a guest: {runs}. The daemons have adopted both QEMUs.")
        return Cast(source, destination, *apis)

    async def _show_refusal(self, source: QemuGuest) -> None:
        """Has QEMU say that it does not migrate this VM, once the guest took a machine check."""

        async def taken() -> bool:
            return bool((await source.admin.report()).machine_checks)

        await until("the guest to touch a poisoned page", taken, WARM_S)
        program = self._program()
        if program.version < REFUSES:
            self._say("This QEMU would try to migrate the guest, and end at the first poisoned page that it reads.")
            return
        words = await source.admin.refusal()
        self._say(f"{program.name}, asked to migrate the guest, says: {words or 'nothing, it does not refuse'}")

    def _pages(self, layout: MemoryLayout) -> tuple[list[Page], list[Page]]:
        """The pages that go bad before and during the move, each once. Every other one is reported to the daemon."""
        options = self._options
        pages = pages_to_lose(layout)
        wanted = options.poison_before + options.poison_during
        if wanted > len(pages):
            raise StageError(f"{wanted} pages to poison, the guest has {len(pages)}", "Give it more --memory.")
        chosen = random.Random(options.shape.seed).sample(pages, wanted)  # The choice need not be secret.
        marked = [(gpa, index % 2 == 0) for index, gpa in enumerate(chosen)]
        return marked[: options.poison_before], marked[options.poison_before :]
