"""Runs one job on its source: saves each state of `state_machine.py`, performs its commands, feeds back the event.

| part of a job | module |
|---|---|
| its values, in memory and in the store | job_record.py |
| the effect of each command | steps.py |
| the way to the commit, and the answer whether the VM runs on the destination | this one |
| the destination's reports in postcopy | destination_watch.py |
| the VM's return, or the release of a VM that has moved | teardown.py |
| a change of the push limit, at any time | push_limit.py |

Downtime runs from the reply to `stop` to the reply to `Start`, on the source's monotonic clock. It includes the return
trip, so it is an upper bound. After a restart in between it is the difference of the two hosts' wall clocks, if that is
not negative.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import assert_never

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.ledger.recorder import LedgerRecorder
from vmferry.migration.chronicle import Chronicle
from vmferry.migration.environment import Environment, Spawn
from vmferry.migration.side import Side
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.destination_watch import DestinationWatch
from vmferry.migration.source.exchange import Exchange
from vmferry.migration.source.job_feed import JobFeed
from vmferry.migration.source.job_record import JobRecord
from vmferry.migration.source.push_limit import PushLimit
from vmferry.migration.source.step_words import step_words
from vmferry.migration.source.steps import RETRY, STEP_FAILED, SourceSteps
from vmferry.migration.source.teardown import Teardown
from vmferry.model.facts import explained
from vmferry.model.migration import TERMINAL, Job, course_with
from vmferry.model.vocabulary import MEANING

log = structlog.get_logger()

STATE = "migration.state"

_UNDO = (m.RevokeCommit, m.AppendJournal, m.ThawPager, m.ResumeVcpus, m.RemovePager, m.RequestRefuse)
_RELEASE = (m.AbandonVmm, m.RemovePager, m.SendFinish)
PERFORMED: Mapping[m.State, tuple[type[m.Command], ...]] = {
    m.State.QUEUED: (),
    m.State.PREPARING: (m.StartPager, m.ServePages, m.AttachMemory, m.MarkPoison, m.SendHello, m.RequestPrepare),
    m.State.SWITCHOVER: (m.ReserveJournal, m.AppendJournal, m.HandOver),
    m.State.COMMITTED: (m.RequestStart,),
    m.State.UNDECIDED: (m.RequestStart,),
    m.State.POSTCOPY: (),
    m.State.POSTCOPY_PAUSED: (),
    m.State.COMPLETING: _RELEASE,
    m.State.CANCELLING: _UNDO,
    m.State.FAILING: _UNDO,
    m.State.COMPLETED: (),
    m.State.CANCELLED: (),
    m.State.FAILED: (),
    m.State.LOST: (m.RemovePager,),
}
"""The commands that the runner performs in each state."""


class JobRunner:
    """Owner of one job's state. `run` is its own task; any task may call `cancel` and `push_limit`."""

    def __init__(  # noqa: PLR0917 the runner's whole environment
        self,
        environment: Environment,
        jobs: JobFeed,
        recorder: LedgerRecorder,
        chronicle: Chronicle,
        job: Job,
        spawn: Spawn,
    ) -> None:
        self._environment = environment
        self.side = Side(environment, chronicle, job.migration, job.vm, "source")
        self._record = JobRecord(jobs, environment.clock, job)
        self._steps = SourceSteps(environment, recorder, job)
        self._watch = DestinationWatch(environment, recorder, self._record, self._steps)
        self._teardown = Teardown(environment, self._steps, job, spawn)
        self.push_limit = PushLimit(environment, self._record, self._steps, spawn)
        self._state = m.State.QUEUED
        self._cancel: m.CancelRequested | None = None
        self._scope: asyncio.Timeout | None = None
        self._decided = asyncio.Event()
        self._outcome_backoff = environment.backoff()
        self._began_s = environment.clock.monotonic_s()
        self._before_s = max(0, job.updated_us - job.created_us) / 1e6
        """The job's age at the start of this daemon: only the wall clock knows what was before."""
        self._log = log.bind(migration=job.migration, vm=job.vm)

    @property
    def job(self) -> Job:
        return self._record.job

    @property
    def cancellable(self) -> bool:
        return self._state in m.CANCELLABLE

    async def run(self, recovered: m.Transition | None = None) -> None:
        """Runs the job to its end. `recovered` is its first step after a restart."""
        exchange = Exchange(self.side, self._steps, lambda: self.job)
        exchanging = asyncio.create_task(exchange.run(), name=f"exchange {self.job.migration}")
        try:
            if recovered is None:
                step = m.transition(m.State.QUEUED, self._cancel or m.JobStarted())
            else:
                await self._steps.recover()
                step = recovered
                if self._steps.serving and step.state not in m.RESTORING:
                    self.push_limit.tell_again()
            while True:
                event = await self._enter(step) or await self._perform(step)
                if event is None:
                    exchanging.cancel()
                    await exchange.last()
                    return
                step = self._with_true_code(m.transition(self._state, event))
        finally:
            self._steps.serving = False
            self._decided.set()
            exchanging.cancel()
            await self._watch.close()
            await self._steps.peer.close()

    async def cancel(self, asked: m.CancelRequested) -> Job:
        """Returns the job once the VM is back on the source.

        Raises: VmferryError PAST_NO_RETURN: the commit is done.
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

    async def _enter(self, step: m.Transition) -> m.Event | None:
        """Makes the new state durable. Returns Failed if that fails before the commit."""
        before, self._state = self._state, step.state
        if step.state is m.State.SWITCHOVER:
            self._environment.processors.keep_awake(self._steps.key)
        elif step.state is not m.State.COMMITTED:
            self._environment.processors.let_sleep(self._steps.key)
            if step.state not in m.RESTORING:
                self._environment.store.release(self._steps.key)
        phase = m.visible_phase(step.state, self.job.phase)
        same_words = not step.reason and step.state in (m.State.CANCELLED, m.State.FAILED)
        reason = (self.job.reason_code, self.job.reason) if same_words else (step.code, step.reason)
        job = replace(self.job, phase=phase, reason_code=reason[0], reason=reason[1])
        if before is not step.state:
            # Logged after the next step of this task: during the blackout each write to the log counts.
            asyncio.get_running_loop().call_soon(partial(self._say, step.state, job))
        if step.state in (m.State.COMMITTED, m.State.COMPLETING):
            self._decided.set()
            return None
        if job == self.job:
            return None
        if step.state in m.RESTORING:
            # The end of the job saves it: the VM must not wait for a store that may have failed.
            self._record.stage(job)
            return None
        return await self._save(job)

    def _say(self, state: m.State, job: Job) -> None:
        """Logs a state, at the level of the phase that people see."""
        if job.phase in TERMINAL or state.value == job.phase.value:
            self.side.look()
            code, reason = explained(job.phase, str(job.reason_code or ""), job.reason, self.side.live)
            self.side.note(job.phase.value, reason)
            say = getattr(self._log, MEANING[job.phase].level)
        else:
            code, reason, say = str(job.reason_code or ""), job.reason, self._log.info
        say(
            STATE,
            state=state.value,
            phase=job.phase.value,
            reason_code=code,
            reason=reason,
            peer_host=self._steps.destination_host or job.destination,
            phase_since_us=self._environment.clock.now_us(),
        )

    async def _save(self, job: Job) -> m.Event | None:
        now = self._environment.clock.now_us()
        course = course_with(job.course, job.phase, now)
        job = replace(job, updated_us=now, course=course, destination_host=self._steps.destination_host)
        if job.phase in TERMINAL:
            total_s = self._before_s + self._environment.clock.monotonic_s() - self._began_s
            job = replace(job, ended_us=max(now, job.created_us), total_s=max(total_s, 1e-6))
        backoff = self._environment.backoff()
        while True:
            try:
                await self._record.save(job)
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
        """Performs the commands in order and returns the event that follows; None: the job has ended.

        Raises: AssertionError, before any effect, for a command that this state does not perform.
        """
        unknown = [command for command in step.commands if not isinstance(command, PERFORMED[step.state])]
        if unknown:
            raise AssertionError(f"nothing performs {unknown} in state {step.state}")
        match step.state:
            case m.State.QUEUED:
                return m.JobStarted()
            case m.State.PREPARING:
                return await self._all(step.commands, self._steps.prepare) or m.DestinationPrepared()
            case m.State.SWITCHOVER:
                return await self._all(step.commands, self._steps.switch) or m.HandedOver()
            case m.State.COMMITTED | m.State.UNDECIDED:
                return await self._find_out(bool(step.commands))
            case m.State.POSTCOPY | m.State.POSTCOPY_PAUSED:
                return await self._watch.next_event()
            case m.State.CANCELLING | m.State.FAILING:
                return await self._teardown.restore(step.commands, self.job.reason)
            case m.State.COMPLETING:
                await self._teardown.release(step.commands)
                return m.SourceReleased()
            case m.State.COMPLETED | m.State.CANCELLED | m.State.FAILED | m.State.LOST:
                await self._teardown.release(step.commands)
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
        """Runs one step before the commit. The step ends at its deadline, or when the job is cancelled."""
        name = type(command).__name__
        loop = asyncio.get_running_loop()
        limit_s = self._steps.limit_s(command)
        there = self._steps.destination_host or self.job.destination
        what, host = step_words(command, self.job.vm, self._environment.host, there)
        try:
            deadline = loop.time() if self._cancel else loop.time() + limit_s
            async with asyncio.timeout_at(deadline) as scope:
                self._scope = scope
                with self.side.waits_for(what, host, limit_s):
                    await work
        except TimeoutError:
            if self._cancel is None:
                return self._late(command, limit_s)
        except VmferryError as error:
            self._log.warning(STEP_FAILED, step=name, reason=error.reason.value, error=str(error))
            return self._cancel or m.Failed(error.reason, str(error))
        except Exception as error:  # noqa: BLE001 whatever it is, the VM must come back
            self._log.exception(STEP_FAILED, step=name)
            return self._cancel or m.Failed(Reason.INTERNAL, f"{name}: {error!r}")
        finally:
            self._scope = None
        return self._cancel

    def _with_true_code(self, step: m.Transition) -> m.Transition:
        """The destination cannot tell a link that is down from memory that ended with the source's VMM."""
        if step.code is Reason.LINK_DOWN and self._steps.memory_ended:
            return replace(step, code=Reason.VMM_GONE)
        return step

    async def _find_out(self, starts: bool) -> m.Event:
        """Finds out whether the VM runs on the destination: by a Start, or by the destination's journal."""
        if starts:
            event = await self._steps.request_start()
        else:
            event = await self._steps.ask_outcome(self._outcome_backoff)
        if isinstance(event, m.Started):
            self._measure(event.started_us)
        return event

    def _measure(self, started_us: int) -> None:
        steps = self._steps
        downtime_s = max(0.0, (started_us - steps.stopped_us) / 1e6) if steps.stopped_us else 0.0
        if steps.stopped_at_s is not None:
            downtime_s = self._environment.clock.monotonic_s() - steps.stopped_at_s
        job = replace(self.job, stopped_us=steps.stopped_us, started_us=started_us, downtime_s=downtime_s)
        job = replace(job, blackout=steps.blackout.parts())
        self._record.stage(job)

    def _late(self, command: m.Command, limit_s: float) -> m.Failed:
        if isinstance(command, m.HandOver):
            error = self._steps.blackout.exceeded(limit_s)
            self._log.warning(STEP_FAILED, step="HandOver", reason=error.reason.value, error=str(error))
            return m.Failed(error.reason, str(error))
        return m.Failed(_late(command), f"{type(command).__name__} took longer than {limit_s:g} s")


def _late(command: m.Command) -> Reason:
    match command:
        case m.StartPager() | m.ServePages() | m.MarkPoison():
            return Reason.PAGER_FAILED
        case m.SendHello() | m.RequestPrepare():
            return Reason.DESTINATION_UNREACHABLE
        case m.ReserveJournal() | m.AppendJournal():
            return Reason.STORE_FAILED
        case _:
            return Reason.VMM_TIMEOUT
