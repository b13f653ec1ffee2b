"""Runs vmferry-reach (reach/README.md), the program that steps into the process of a QEMU."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmferry.errors import Reason, VmferryError
from vmferry.v1 import reach_pb2 as pb

FDS_MAX = 64
LOG_LIMIT = 2000
Range = tuple[int, int]
"""First byte and size."""


class ReachFailed(VmferryError):  # noqa: N818 - what happened
    """The program refused a request; `code` is its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(Reason.VMM_REFUSED, message, "See reach/README.md for the rights that vmferryd needs.")
        self.code = code


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one of its number. `pidfd` is the owner's to close."""

    pid: int
    start_time: int
    pidfd: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises: VmferryError VMM_GONE."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise _gone(pid) from error
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape").rpartition(")")[2].split()
        except OSError as error:
            os.close(pidfd)
            raise _gone(pid) from error
        return cls(pid, int(fields[19]), pidfd)


class Reach(Protocol):
    """The program, as the adapter uses it. Raises: ReachFailed, VmferryError VMM_TIMEOUT or INTERNAL."""

    async def call(self, process: Process, request: pb.ReachRequest) -> tuple[pb.ReachReply, list[int]]:
        """The reply, and the descriptors that came with it, which are the caller's to close."""
        ...


class ReachProgram:
    """Implements `Reach` by one run of the program for each request."""

    def __init__(self, locate: Callable[[], str], within_s: float) -> None:
        self._locate = locate
        self._within_s = within_s

    async def call(self, process: Process, request: pb.ReachRequest) -> tuple[pb.ReachReply, list[int]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with closing(ours), closing(theirs):
            who = pb.ReachProcess(pid=process.pid, start_time=process.start_time, pidfd=process.pidfd)
            request.MergeFrom(pb.ReachRequest(process=who, descriptor_socket=theirs.fileno()))
            output = await self._run(request, (process.pidfd, theirs.fileno()))
            reply = pb.ReachReply.FromString(output)
            descriptors: list[int] = []
            if reply.descriptors:
                ours.setblocking(False)
                _, descriptors, _, _ = socket.recv_fds(ours, 1, FDS_MAX)
        if reply.HasField("error") or len(descriptors) != reply.descriptors:
            close_all(descriptors)
            words = reply.error.message or f"{len(descriptors)} of {reply.descriptors} descriptors came"
            raise ReachFailed(reply.error.code, words)
        return reply, descriptors

    async def _run(self, request: pb.ReachRequest, pass_fds: Sequence[int]) -> bytes:
        program = self._locate()
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as error:
            raise VmferryError(
                Reason.INTERNAL, f"{program} cannot be run: {error}.", "Install it beside vmferryd."
            ) from error
        talk = asyncio.create_task(process.communicate(request.SerializeToString()), name="reach")
        try:
            async with asyncio.timeout(self._within_s):
                output, log = await asyncio.shield(talk)
        except TimeoutError as error:
            raise VmferryError(
                Reason.VMM_TIMEOUT, f"{program} did not finish within {self._within_s:g} s.", ""
            ) from error
        finally:
            if not talk.done():
                process.terminate()  # never killed: that would end the other process in the middle of a foreign call
        if process.returncode not in (0, 1):
            words = log.decode(errors="replace")[-LOG_LIMIT:].strip()
            raise VmferryError(Reason.INTERNAL, f"{program} ended with {process.returncode}: {words}.", "")
        return output


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def ranges(pairs: Sequence[Range]) -> list[pb.HvaRange]:
    return [pb.HvaRange(start=start, size=size) for start, size in pairs]


def _gone(pid: int) -> VmferryError:
    return VmferryError(Reason.VMM_GONE, f"QEMU's process {pid} has ended.", "Look at QEMU's log for why.")
