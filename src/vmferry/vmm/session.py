"""One connected VMM: requests with ids out, replies in. Implements `ports.Vmm`.

```
core ──request──▶ session ──frame──▶ VMM          requests of one VM may overlap; `id` tells the replies apart
      ◀──result───         ◀──frame──
VMM ──memory_error──▶ session ──▶ queue ──▶ on_memory_errors (durable) ──▶ recorded
VMM ──guest_reset───▶ session ──▶ queue ──▶ on_guest_reset ──────────────▶ recorded
```

The known state of the VMM follows its replies, also those that come after their time-out. A task of its own records
errors in order, so that the ledger never delays a reply that the core waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import MemoryLayout
from vmferry.model.memory_error import LedgerEntry
from vmferry.model.vmm import VmmIdentity
from vmferry.vmm import protocol
from vmferry.vmm.protocol import FromVmm, ProtocolError, Refusal, Reply, Request, ToVmm

log = structlog.get_logger()

ERROR_NOT_RECORDED = "vmm.memory_error_not_recorded"
RESET_NOT_TOLD = "vmm.guest_reset_not_told"
LATE_ANSWER = "vmm.late_answer"

ERRORS_MAX = 1 << 20
"""The most memory errors that may wait to be recorded; more are an error of the VMM. Replies never wait behind them."""
ERRORS_AT_ONCE = 1024
"""The most memory errors in one write to the ledger."""
RECORD_RETRY_S = 1.0

RecordErrors = Callable[[str, Sequence[LedgerEntry]], Awaitable[None]]
TellReset = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class VmmDeadlines:
    """The deadlines for a VMM's replies, seconds. `prepare` makes the guest's memory; device states may be large."""

    hello_s: float = 10.0
    attach_memory_s: float = 10.0
    stop_s: float = 10.0
    save_state_s: float = 30.0
    resume_s: float = 10.0
    abandon_s: float = 10.0
    prepare_s: float = 60.0
    load_state_s: float = 60.0
    start_s: float = 10.0
    migration_complete_s: float = 10.0
    reset_s: float = 30.0


@dataclass(slots=True)
class _Pending:
    request: Request
    answer: asyncio.Future[Reply | Refusal] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class VmmSession:
    """The session of a VMM, from its hello to the end of its connection."""

    def __init__(
        self, identity: VmmIdentity, writer: asyncio.StreamWriter, deadlines: VmmDeadlines, now_us: Callable[[], int]
    ) -> None:
        self._identity = identity
        self._writer = writer
        self._deadlines = deadlines
        self._now_us = now_us
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._errors: asyncio.Queue[tuple[int, LedgerEntry | None]] = asyncio.Queue()
        """None: a reset of the guest."""
        self._ended = asyncio.Event()
        self._why = ""

    @property
    def identity(self) -> VmmIdentity:
        return self._identity

    # source

    async def attach_memory(self, socket: Path) -> None:
        await self._ask(protocol.AttachMemory(self._next_id(), str(socket)), self._deadlines.attach_memory_s)

    async def stop(self) -> None:
        await self._ask(protocol.Stop(self._next_id()), self._deadlines.stop_s)

    async def save_state(self) -> bytes:
        reply = await self._ask(protocol.SaveState(self._next_id()), self._deadlines.save_state_s)
        assert reply.state is not None, "checked when it came"
        return reply.state

    async def resume(self) -> None:
        await self._ask(protocol.Resume(self._next_id()), self._deadlines.resume_s)

    async def abandon(self) -> None:
        await self._ask(protocol.Abandon(self._next_id()), self._deadlines.abandon_s)

    # destination

    async def prepare(self, layout: MemoryLayout, vcpus: int, uffd_features: Sequence[str], socket: Path) -> None:
        regions = protocol.prepare_regions(layout)
        request = protocol.Prepare(self._next_id(), regions, vcpus, list(uffd_features), str(socket))
        await self._ask(request, self._deadlines.prepare_s)

    async def load_state(self, state: bytes) -> None:
        await self._ask(protocol.LoadState(self._next_id(), state), self._deadlines.load_state_s)

    async def start(self) -> None:
        await self._ask(protocol.Start(self._next_id()), self._deadlines.start_s)

    async def migration_complete(self, keep_uffd: bool) -> None:
        request = protocol.MigrationComplete(self._next_id(), keep_uffd)
        await self._ask(request, self._deadlines.migration_complete_s)

    async def reset(self) -> None:
        await self._ask(protocol.Reset(self._next_id()), self._deadlines.reset_s)

    async def gone(self) -> str:
        await self._ended.wait()
        return self._why

    # the connection's side, for server.py

    def send(self, message: ToVmm) -> None:
        """Puts a message into the connection's buffer."""
        self._writer.write(protocol.encode(message))

    async def take(self, message: FromVmm) -> None:
        """Handles a message of the VMM. Raises: ProtocolError if the message may not come now."""
        match message:
            case Reply() | Refusal():
                self._take_answer(message)
            case protocol.MemoryErrorReport():
                if self._errors.qsize() >= ERRORS_MAX:
                    raise ProtocolError("seq", f"{ERRORS_MAX} memory errors wait already; send no more of them")
                entry = protocol.entry_of(message, self._identity.layout, self._now_us())
                self._errors.put_nowait((message.seq, entry))
            case protocol.GuestReset(seq):
                self._errors.put_nowait((seq, None))
            case protocol.Hello():
                raise ProtocolError("type", "a second hello on one connection")

    async def record_errors(self, record: RecordErrors, tell_reset: TellReset) -> None:
        """Records the errors in order, many in one write, and retries each write. A reset of the guest takes its turn.
        It ends with the connection.
        """
        waiting: list[tuple[int, LedgerEntry | None]] = []
        while True:
            waiting = waiting or [await self._errors.get()]
            while not self._errors.empty() and len(waiting) < ERRORS_AT_ONCE:
                waiting.append(self._errors.get_nowait())
            errors = list(takewhile(lambda one: one[1] is not None, waiting))
            entries = [entry for _, entry in errors if entry is not None]
            batch = errors or waiting[:1]
            waiting = waiting[len(batch) :]
            while not await (self._recorded(record, entries) if entries else self._told(tell_reset)):  # noqa: ASYNC110
                await asyncio.sleep(RECORD_RETRY_S)
            try:
                for seq, _ in batch:
                    self.send(protocol.Recorded(seq))
                await self._writer.drain()
            except OSError:
                return

    def end(self, reason: Reason, why: str) -> None:
        """Ends the session and fails its pending requests. `why` completes "the VMM …"."""
        if self._ended.is_set():
            return
        self._why = why
        self._ended.set()
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_exception(self._over(reason))
        self._pending.clear()

    async def _recorded(self, record: RecordErrors, entries: Sequence[LedgerEntry]) -> bool:
        said = {"vm": self._identity.vm, "gpa": hex(entries[0].gpa), "count": len(entries)}
        try:
            await record(self._identity.vm, entries)
        except VmferryError as error:
            log.warning(ERROR_NOT_RECORDED, **said, error=str(error))
            return False
        except Exception:  # After any fault of the callback the errors must be neither acknowledged nor dropped.
            log.exception(ERROR_NOT_RECORDED, **said)
            return False
        return True

    async def _told(self, tell_reset: TellReset) -> bool:
        try:
            await tell_reset(self._identity.vm)
        except VmferryError as error:
            log.warning(RESET_NOT_TOLD, vm=self._identity.vm, error=str(error))
            return False
        except Exception:  # as in `_recorded`
            log.exception(RESET_NOT_TOLD, vm=self._identity.vm)
            return False
        return True

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    async def _ask(self, request: Request, deadline_s: float) -> Reply:
        if self._ended.is_set():
            raise self._over(Reason.VMM_GONE)
        try:
            frame = protocol.encode(request)
        except ProtocolError as error:
            raise VmferryError(Reason.VMM_PROTOCOL, f"{_name(request)} to VM {self._identity.vm}: {error}.") from error
        pending = _Pending(request)
        self._pending[request.id] = pending
        try:
            async with asyncio.timeout(deadline_s):
                self._writer.write(frame)
                await self._writer.drain()
                answer = await pending.answer
        except TimeoutError as error:
            raise VmferryError(
                Reason.VMM_TIMEOUT,
                f"The VMM of {self._identity.vm} (pid {self._identity.pid}) did not answer {_name(request)} "
                f"within {deadline_s:g} s.",
                "See the VMM's log; it may be stuck or overloaded.",
            ) from error
        except OSError as error:
            pending.answer.cancel()
            self.end(Reason.VMM_GONE, f"broke the connection ({error})")
            raise self._over(Reason.VMM_GONE) from error
        if isinstance(answer, Refusal):
            raise self._refused(request, answer)
        return answer

    def _take_answer(self, answer: Reply | Refusal) -> None:
        pending = self._pending.get(answer.id)
        if pending is None:
            raise ProtocolError("id", f"{answer.id} is no request that waits for an answer")
        if isinstance(answer, Reply):
            _check_reply(pending.request, answer)
            self._identity = _identity_after(self._identity, pending.request)
        del self._pending[answer.id]  # Only now: a wrong reply ends the connection, which fails the pending requests.
        if pending.answer.done():
            log.info(LATE_ANSWER, vm=self._identity.vm, request=_name(pending.request))
        else:
            pending.answer.set_result(answer)

    def _over(self, reason: Reason) -> VmferryError:
        return VmferryError(
            reason,
            f"The VMM of {self._identity.vm} (pid {self._identity.pid}) {self._why}.",
            "See the VMM's log for why it ended.",
        )

    def _refused(self, request: Request, refusal: Refusal) -> VmferryError:
        """NO_MEMORY has its own reason: the destination host lacks memory, and the VMM is not at fault."""
        no_memory = refusal.code == protocol.CODE_NO_MEMORY
        where = f" {refusal.field}:" if refusal.field else ""
        return VmferryError(
            Reason.DESTINATION_NO_MEMORY if no_memory else Reason.VMM_REFUSED,
            f"The VMM of {self._identity.vm} (pid {self._identity.pid}) refused {_name(request)}: "
            f"{refusal.code}:{where} {refusal.message}",
            "Free memory on the destination or choose another." if no_memory else "See the VMM's log.",
        )


def _name(request: Request) -> str:
    tag = type(request).__struct_config__.tag
    return str(tag)


def _check_reply(request: Request, reply: Reply) -> None:
    """Raises: ProtocolError if the reply lacks the value that it must carry."""
    match request:
        case protocol.Stop() if reply.stopped_us is None:
            raise ProtocolError("stopped_us", "missing in the answer to stop")
        case protocol.SaveState() if reply.state is None:
            raise ProtocolError("state", "missing in the answer to save_state")
        case protocol.Start() if reply.started_us is None:
            raise ProtocolError("started_us", "missing in the answer to start")
        case _:
            pass


_STATE_AFTER: dict[type, str] = {
    protocol.Stop: "stopped",
    protocol.Resume: "running",
    protocol.Abandon: "gone",
    protocol.Prepare: "prepared",
    protocol.LoadState: "loaded",
    protocol.Start: "running",
    protocol.Reset: "incoming",
}
"""The protocol's table "required state → state". The other requests change no state."""


def _identity_after(identity: VmmIdentity, request: Request) -> VmmIdentity:
    """The VMM's state after the request."""
    state = _STATE_AFTER.get(type(request), identity.state)
    match request:
        case protocol.Prepare():
            layout = MemoryLayout(tuple(protocol.model_region(region) for region in request.regions))
            return replace(identity, state=state, layout=layout, vcpus=request.vcpus)
        case protocol.Reset():
            return replace(identity, state=state, layout=MemoryLayout(()), vcpus=0)
        case _:
            return replace(identity, state=state)
