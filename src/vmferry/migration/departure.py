"""Runs one job on its source: asks `machine.py`, makes the answer durable, does it, and feeds back what came of it.

Downtime is measured on the source's monotonic clock, from the answer to `stop` to the answer to Start: it holds the
network's way back, and so is never too small. After a restart in between it is the difference of the two hosts' wall
clocks, if that is not negative.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.migration import machine as m
from vmferry.migration.jobs import Jobs
from vmferry.migration.memory_errors import MemoryErrors
from vmferry.migration.model import TERMINAL, Job, Outcome
from vmferry.migration.ports import IncomingUpdate
from vmferry.migration.source_steps import SourceSteps
from vmferry.migration.world import Backoff, World

log = structlog.get_logger()

STATE = "migration.state"
STEP_FAILED = "migration.step_failed"
RETRY = "migration.step_retried"

Spawn = Callable[[str, Coroutine[Any, Any, None]], object]
ONCE_THEN_GIVE_UP = 3
"""Attempts at a step of the way back that the VM's own return does not depend on."""


class Departure:
    """Owner of one job. `run` is its only task; `cancel` may be called from any other."""

    def __init__(self, world: World, jobs: Jobs, errors: MemoryErrors, job: Job, spawn: Spawn) -> None:
        self.job = job
        self._world = world
        self._jobs = jobs
        self._errors = errors
        self._spawn = spawn
        self._steps = SourceSteps(world, errors, job)
        self._state = m.State.QUEUED
        self._cancel: m.CancelAsked | None = None
        self._scope: asyncio.Timeout | None = None
        self._decided = asyncio.Event()
        self._saving = asyncio.Lock()
        self._outcome_backoff = Backoff(world)
        self._updates: AsyncIterator[IncomingUpdate] | None = None
        self._watch_backoff = Backoff(world)
        self._log = log.bind(migration=job.migration, vm=job.vm)

    @property
    def cancellable(self) -> bool:
        return self._state in m.CANCELLABLE and not self._steps.commit_tried

    async def run(self, recovered: m.Transition | None = None) -> None:
        """Until the job has ended. `recovered`: where it goes on after a restart."""
        try:
            if recovered is None:
                step = m.transition(m.State.QUEUED, self._cancel or m.Begun())
            else:
                await self._steps.take_up()
                step = recovered
                if self._steps.serving and step.state not in m.RESTORING:
                    self._spawn(f"push limit {self.job.migration}", self._tell_push_limit_again())
            while True:
                event = await self._enter(step) or await self._perform(step)
                if event is None:
                    return
                step = m.transition(self._state, event)
        finally:
            self._steps.serving = False
            self._decided.set()
            await self._close_updates()
            await self._steps.peer.close()

    async def cancel(self, asked: m.CancelAsked) -> Job:
        """Returns the job once the VM is back, or the commit is past.

        Raises: VmferryError PAST_NO_RETURN.
        """
        if self._state in m.CANCELLABLE:
            self._cancel = asked
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())
            await self._decided.wait()
        elif self._state in m.RESTORING:
            await self._decided.wait()
        if self.job.phase not in TERMINAL or self._state in (m.State.COMPLETED, m.State.LOST):
            raise m.IllegalEventError(self._state, asked, m.CANCELLABLE)
        return self.job

    async def set_push_limit(self, push_bytes_per_s: int) -> Job:
        """Durable first, then told to the source's pager, also when it is the limit already. Goes on by itself when the
        caller goes away: what is durable and what is known here must not part.

        Raises: VmferryError MIGRATION_ENDED; PAGER_FAILED: the limit is durable, and the pager does not know it yet.
        """
        answer: asyncio.Future[Job] = asyncio.get_running_loop().create_future()
        self._spawn(f"push limit {self.job.migration}", self._set_push_limit(push_bytes_per_s, answer))
        return await answer

    async def _set_push_limit(self, push_bytes_per_s: int, answer: asyncio.Future[Job]) -> None:
        try:
            await self._save_push_limit(push_bytes_per_s)
            await self._steps.tell_push_limit()
        except VmferryError as error:
            if not answer.done():
                answer.set_exception(error)
        else:
            if not answer.done():
                answer.set_result(self.job)
        finally:
            answer.cancel()

    async def _save_push_limit(self, push_bytes_per_s: int) -> None:
        async with self._saving:
            if self.job.phase in TERMINAL:
                raise ended(self.job)
            if push_bytes_per_s != self.job.push_bytes_per_s:
                now = self._world.clock.now_us()
                saved = await self._jobs.save(replace(self.job, push_bytes_per_s=push_bytes_per_s, updated_us=now))
                self.job = replace(self.job, push_bytes_per_s=push_bytes_per_s, updated_us=now, revision=saved.revision)
            self._steps.push_bytes_per_s = push_bytes_per_s

    async def _tell_push_limit_again(self) -> None:
        """After a restart: the one before may have died between the store and the pager."""
        backoff = Backoff(self._world)
        while self._steps.serving:
            try:
                await self._steps.tell_push_limit()
            except VmferryError as error:
                self._log.warning(RETRY, step="push limit", error=str(error))
            else:
                return
            await backoff.pause()

    async def _enter(self, step: m.Transition) -> m.Event | None:
        """Makes the new state durable. An event: that failed, where failing is still allowed."""
        before, self._state = self._state, step.state
        phase = m.visible_phase(step.state, self.job.phase)
        same_words = not step.reason and step.state in m.ENDED and self.job.reason_code is not None
        reason = (self.job.reason_code, self.job.reason) if same_words else (step.code, step.reason)
        job = replace(self.job, phase=phase, reason_code=reason[0], reason=reason[1])
        if before is not step.state:
            said = partial(self._log.info, STATE, state=step.state.value, reason=step.reason)
            asyncio.get_running_loop().call_soon(said)  # behind what this task does next: a VM may stand still
        if step.state in (m.State.COMMITTED, m.State.COMPLETING):
            self._decided.set()
            return None
        if job == self.job:
            return None
        if step.state in m.RESTORING:
            self.job = job  # durable with its end; the VM must not wait for a store that may be what failed
            return None
        return await self._save(job)

    async def _save(self, job: Job) -> m.Event | None:
        now = self._world.clock.now_us()
        job = replace(job, updated_us=now, ended_us=now if job.phase in TERMINAL else 0)
        backoff = Backoff(self._world)
        while True:
            try:
                async with self._saving:
                    self.job = await self._jobs.save(replace(job, push_bytes_per_s=self.job.push_bytes_per_s))
            except VmferryError as error:
                if self._state in m.CANCELLABLE:
                    return m.Failed(error.reason, str(error))
                self._log.warning(RETRY, step="save", error=str(error))
            else:
                if self.job.phase in TERMINAL:
                    self._decided.set()
                return None
            await backoff.pause()

    async def _perform(  # noqa: PLR0911 one for each state
        self, step: m.Transition
    ) -> m.Event | None:
        """Does the commands in order; the event that comes of them, None once the job has ended."""
        match step.state:
            case m.State.QUEUED:
                return m.Begun()
            case m.State.PREPARING:
                return await self._all(step.commands, self._steps.prepare) or m.DestinationPrepared()
            case m.State.SWITCHOVER:
                return await self._switch(step.commands)
            case m.State.COMMITTED | m.State.UNDECIDED:
                return await self._find_out(step.commands)
            case m.State.POSTCOPY | m.State.POSTCOPY_PAUSED:
                return await self._follow()
            case m.State.CANCELLING | m.State.FAILING:
                return await self._restore(step.commands)
            case m.State.COMPLETING:
                await self._release(step.commands)
                return m.SourceReleased()
            case m.State.COMPLETED | m.State.CANCELLED | m.State.FAILED | m.State.LOST:
                await self._release(step.commands)
                return None
            case _:
                assert_never(step.state)

    async def _all(self, commands: tuple[m.Command, ...], do: Callable[[m.Command], Awaitable[None]]) -> m.Event | None:
        for command in commands:
            failed = await self._interruptible(command, do(command))
            if failed is not None:
                return failed
        return None

    async def _interruptible(self, command: m.Command, work: Awaitable[None]) -> m.Event | None:
        """One step before the commit: it ends at the latest with its deadline, or when the job is cancelled."""
        name = type(command).__name__
        loop = asyncio.get_running_loop()
        limit_s = self._world.timeouts.step_s + self._steps.allowance_s(command)
        try:
            deadline = loop.time() if self._cancel else loop.time() + limit_s
            async with asyncio.timeout_at(deadline) as scope:
                self._scope = scope
                await work
        except TimeoutError:
            if self._cancel is None:
                return m.Failed(_late(command), f"{name} took longer than {limit_s:g} s")
        except VmferryError as error:
            self._log.warning(STEP_FAILED, step=name, reason=error.reason.value, error=str(error))
            return self._cancel or m.Failed(error.reason, str(error))
        except Exception as error:  # noqa: BLE001 whatever it is, the VM must come back
            self._log.exception(STEP_FAILED, step=name)
            return self._cancel or m.Failed(Reason.INTERNAL, f"{name}: {error!r}")
        finally:
            self._scope = None
        return self._cancel

    async def _switch(self, commands: tuple[m.Command, ...]) -> m.Event:
        failed = await self._all(commands[:-1], self._switch_step)
        if failed is not None:
            return failed
        try:
            await self._steps.journal(m.JournalKind.COMMIT)
        except VmferryError as error:
            return m.Failed(error.reason, str(error))
        return m.CommitDurable()

    async def _switch_step(self, command: m.Command) -> None:
        if isinstance(command, m.Journal):
            await self._steps.journal(command.kind)
        else:
            await self._steps.switch(command)

    async def _find_out(self, commands: tuple[m.Command, ...]) -> m.Event:
        if commands == (m.CallStart(),):
            event = await self._steps.call_start()
        else:
            event = await self._steps.ask_outcome(self._outcome_backoff)
        if isinstance(event, m.Started):
            self._measure(event.started_us)
        return event

    def _measure(self, started_us: int) -> None:
        steps = self._steps
        downtime_s = max(0.0, (started_us - steps.stopped_us) / 1e6) if steps.stopped_us else 0.0
        if steps.stopped_at_s is not None:
            downtime_s = self._world.clock.monotonic_s() - steps.stopped_at_s
        self.job = replace(self.job, stopped_us=steps.stopped_us, started_us=started_us, downtime_s=downtime_s)

    async def _follow(self) -> m.Event:
        """The next report of the destination that changes the job; progress alone is only shown."""
        while True:
            try:
                update = await self._next_update()
                await self._take_in(update)
            except VmferryError as error:
                await self._close_updates()
                await self._watch_backoff.pause()
                if self.job.reason_code is not Reason.DESTINATION_UNREACHABLE:
                    return m.Silent(f"no news from the destination's daemon: {error.message}")
                continue
            self._watch_backoff = Backoff(self._world)
            if update.lost_reason:
                return m.DestinationDied(update.lost_reason)
            if update.outcome is Outcome.COMPLETED:
                return m.DestinationCompleted()
            shown = self.job.reason if self.job.reason_code is Reason.LINK_DOWN else ""
            if update.paused_reason != shown or self.job.reason_code is Reason.DESTINATION_UNREACHABLE:
                return m.Heard(update.paused_reason)

    async def _next_update(self) -> IncomingUpdate:
        if self._updates is None:
            self._updates = self._steps.updates()
        try:
            return await anext(self._updates)
        except StopAsyncIteration:
            raise VmferryError(Reason.DESTINATION_UNREACHABLE, "its stream of news ended.") from None

    async def _take_in(self, update: IncomingUpdate) -> None:
        if update.errors:
            await self._errors.record(self.job.vm, update.errors)
        known = len(await self._errors.ledger(self.job.vm)) if update.errors else self.job.memory_errors
        self.job = self._jobs.show_progress(self.job, update.progress, known)

    async def _close_updates(self) -> None:
        updates, self._updates = self._updates, None
        close = getattr(updates, "aclose", None)
        if close is not None:
            await close()

    async def _restore(self, commands: tuple[m.Command, ...]) -> m.Event:
        """The VM back on the source; what else fails on the way is logged and, where it can be, tried again."""
        outcome: m.Event = m.Restored()
        for command in commands:
            match command:
                case m.Journal(kind):
                    await self._journal_way_back(kind)
                case m.ResumeVcpus():
                    outcome = await self._resume()
                case m.AskRefuse():
                    await self._refuse()
                case m.ThawPager():
                    await self._best_effort(command, self._steps.thaw)
                case m.RemovePager():
                    await self._best_effort(command, self._steps.remove_pager)
                case _:
                    raise AssertionError(f"not a step of the way back: {command}")
        return outcome

    async def _journal_way_back(self, kind: m.JournalKind) -> None:
        """Once a commit was tried the VM must not run before this is durable: the commit may be."""
        backoff = Backoff(self._world)
        while True:
            try:
                await self._steps.journal(kind)
            except VmferryError as error:
                self._log.warning(RETRY, step=kind.value, error=str(error))
                if not self._steps.commit_tried:
                    return
            else:
                return
            await backoff.pause()

    async def _resume(self) -> m.Event:
        backoff = Backoff(self._world)
        deadline = self._world.clock.monotonic_s() + self._world.timeouts.vmm_return_s
        while True:
            try:
                await self._steps.resume()
            except VmferryError as error:
                self._log.warning(RETRY, step="resume", error=str(error))
                gone = error.reason is Reason.VMM_GONE
                if gone or self._world.clock.monotonic_s() >= deadline:
                    words = f"{self.job.reason}; and the VM could not be resumed here: {error}"
                    return m.RestoreFailed(error.reason, words)
            else:
                return m.Restored()
            await backoff.pause()

    async def _refuse(self) -> None:
        """One try now, so that nothing is left behind when the job ends; the others in the background."""
        if not self._steps.asked_destination:
            return
        steps, reason = self._steps, self.job.reason
        try:
            async with asyncio.timeout(self._world.timeouts.refuse_s):
                await steps.refuse(reason)
        except (VmferryError, TimeoutError) as error:
            self._log.warning(RETRY, step="refuse", error=str(error))
            self._spawn(f"refuse {self.job.migration}", self._refuse_later(reason))

    async def _refuse_later(self, reason: str) -> None:
        peer = self._world.peers.connect(self.job.destination)
        backoff = Backoff(self._world)
        try:
            for _ in range(self._world.timeouts.refuse_attempts):
                await backoff.pause()
                try:
                    async with asyncio.timeout(self._world.timeouts.refuse_s):
                        return await peer.refuse(self.job.migration, reason)
                except (VmferryError, TimeoutError) as error:
                    self._log.warning(RETRY, step="refuse", error=str(error))
        finally:
            await peer.close()

    async def _release(self, commands: tuple[m.Command, ...]) -> None:
        for command in commands:
            match command:
                case m.AbandonVmm():
                    await self._best_effort(command, self._steps.abandon)
                case m.RemovePager():
                    await self._best_effort(command, self._steps.remove_pager)
                case m.SayFinish():
                    await self._best_effort(command, self._steps.finish)
                case _:
                    raise AssertionError(f"not a step after the move: {command}")

    async def _best_effort(self, command: m.Command, work: Callable[[], Awaitable[None]]) -> None:
        backoff = Backoff(self._world)
        for _ in range(ONCE_THEN_GIVE_UP):
            try:
                await work()
            except VmferryError as error:
                self._log.warning(STEP_FAILED, step=type(command).__name__, error=str(error))
            else:
                return
            await backoff.pause()


def ended(job: Job) -> VmferryError:
    """A job that nothing can be changed of any more; to be raised."""
    return VmferryError(
        Reason.MIGRATION_ENDED,
        f"{job.migration} has ended ({job.phase}); it pushes nothing any more.",
        "A new migration takes its limit from its request.",
    )


def _late(command: m.Command) -> Reason:
    match command:
        case m.StartPager() | m.ServePages():
            return Reason.PAGER_FAILED
        case m.SayHello() | m.AskPrepare() | m.SendReady():
            return Reason.DESTINATION_UNREACHABLE
        case m.Journal():
            return Reason.STORE_FAILED
        case _:
            return Reason.VMM_TIMEOUT
