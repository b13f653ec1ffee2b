"""The ends of a job on its source: the VM runs here again, or it has moved and is released.

A cancel ends none of these steps, and only the VM's own return can fail the job. The attempts at each step:

| step | attempts |
|---|---|
| end of a commit that was tried | until `aborted` is durable here, or `refused` on the destination |
| journal after the destination's refusal | until it is durable |
| journal of the way back, if it is not durable yet | one |
| the VM's return | until its VMM is gone, or for `Timeouts.vmm_return_s` |
| refusal by the destination | one in the job, then `Timeouts.refuse_attempts` in the background |
| all others | `ATTEMPTS` |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from vmferry.aio.concurrency import race
from vmferry.errors import Reason, VmferryError
from vmferry.migration.environment import Environment, Spawn
from vmferry.migration.source import state_machine as m
from vmferry.migration.source.steps import RETRY, STEP_FAILED, SourceSteps
from vmferry.model.migration import Job

log = structlog.get_logger()

ATTEMPTS = 3
"""The attempts at a step that the VM's return does not depend on."""


class Teardown:
    """The last steps of one job, and the attempts at each."""

    def __init__(self, environment: Environment, steps: SourceSteps, job: Job, spawn: Spawn) -> None:
        self._environment = environment
        self._steps = steps
        self._migration = job.migration
        self._destination = job.destination
        self._nonce = job.nonce
        self._spawn = spawn
        self._log = log.bind(migration=job.migration, vm=job.vm)

    async def restore(self, commands: tuple[m.Command, ...], reason: str) -> m.Event:
        """Brings the VM back on the source. `reason` is for the destination and for people."""
        outcome: m.Event = m.Restored()
        for command in commands:
            match command:
                case m.RevokeCommit():
                    await self._revoke_commit(reason)
                case m.AppendJournal(kind):
                    await self._journal(kind)
                case m.ResumeVcpus():
                    outcome = await self._resume(reason)
                case m.RequestRefuse():
                    await self._refuse(reason)
                case m.ThawPager():
                    await self._best_effort(command, self._steps.thaw)
                case m.RemovePager():
                    await self._best_effort(command, self._steps.remove_pager)
                case _:
                    raise AssertionError(f"not a step of the way back: {command}")
        return outcome

    async def release(self, commands: tuple[m.Command, ...]) -> None:
        """Frees the source's parts of a VM that has moved, or is lost."""
        for command in commands:
            match command:
                case m.AbandonVmm():
                    await self._best_effort(command, self._steps.abandon)
                case m.RemovePager():
                    await self._best_effort(command, self._steps.remove_pager)
                case m.SendFinish():
                    await self._best_effort(command, self._steps.finish)
                case _:
                    raise AssertionError(f"not a step after the move: {command}")

    async def _revoke_commit(self, reason: str) -> None:
        """Returns once the destination can never start the VM. If no commit was tried, it cannot."""
        if self._steps.commit_tried:
            await race(self._append_until_durable(m.JournalKind.ABORTED), self._refuse_until_durable(reason))

    async def _append_until_durable(self, kind: m.JournalKind) -> None:
        backoff = self._environment.backoff()
        while True:
            try:
                return await self._steps.journal(kind)
            except VmferryError as error:
                self._log.warning(RETRY, step=kind.value, error=str(error))
            await backoff.pause()

    async def _refuse_until_durable(self, reason: str) -> None:
        """For a store that does not answer. A store that works is quicker than the first pause."""
        backoff = self._environment.backoff()
        while True:
            await backoff.pause()
            try:
                return await self._steps.refuse(reason)
            except VmferryError as error:
                self._log.warning(RETRY, step="refuse", error=str(error))

    async def _journal(self, kind: m.JournalKind) -> None:
        """Journals the way back. The refusal of the destination settles a commit, and is durable before the VM runs."""
        if kind is m.JournalKind.SETTLED:
            return await self._append_until_durable(kind)
        try:
            async with asyncio.timeout(self._environment.timeouts.refuse_s):
                await self._steps.journal(kind)
        except (VmferryError, TimeoutError) as error:
            self._log.warning(STEP_FAILED, step=kind.value, error=str(error))
        finally:
            self._environment.store.release(self._steps.key)

    async def _resume(self, reason: str) -> m.Event:
        backoff = self._environment.backoff()
        deadline = self._environment.clock.monotonic_s() + self._environment.timeouts.vmm_return_s
        while True:
            try:
                await self._steps.resume()
            except VmferryError as error:
                self._log.warning(RETRY, step="resume", error=str(error))
                gone = error.reason is Reason.VMM_GONE
                if gone or self._environment.clock.monotonic_s() >= deadline:
                    words = f"{reason}; and the VM could not be resumed here: {error}"
                    return m.RestoreFailed(error.reason, words)
            else:
                return m.Restored()
            await backoff.pause()

    async def _refuse(self, reason: str) -> None:
        """Asks once now, so that the job leaves nothing behind. The other attempts run in the background."""
        if not self._steps.asked_destination:
            return
        try:
            async with asyncio.timeout(self._environment.timeouts.refuse_s):
                await self._steps.refuse(reason)
        except (VmferryError, TimeoutError) as error:
            self._log.warning(RETRY, step="refuse", error=str(error))
            self._spawn(f"refuse {self._migration}", self._refuse_later(reason))

    async def _refuse_later(self, reason: str) -> None:
        peer = self._environment.peers.connect(self._destination, self._nonce)
        backoff = self._environment.backoff()
        try:
            for _ in range(self._environment.timeouts.refuse_attempts):
                await backoff.pause()
                try:
                    async with asyncio.timeout(self._environment.timeouts.refuse_s):
                        return await peer.refuse(self._migration, reason)
                except (VmferryError, TimeoutError) as error:
                    self._log.warning(RETRY, step="refuse", error=str(error))
        finally:
            await peer.close()

    async def _best_effort(self, command: m.Command, work: Callable[[], Awaitable[None]]) -> None:
        backoff = self._environment.backoff()
        for _ in range(ATTEMPTS):
            try:
                await work()
            except VmferryError as error:
                self._log.warning(STEP_FAILED, step=type(command).__name__, error=str(error))
            except Exception:  # noqa: BLE001 whatever it is, the job must end
                self._log.exception(STEP_FAILED, step=type(command).__name__)
            else:
                return
            await backoff.pause()
