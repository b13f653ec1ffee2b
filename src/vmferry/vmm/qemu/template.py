"""Starts a QEMU for a VM that comes, by a program of this host. Implements `ports.VmmStarter`."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

import structlog

from vmferry.errors import Reason, VmferryError
from vmferry.ports import Vmms

log = structlog.get_logger()

STARTED = "qemu.started_by_template"
LOOK_S = 0.05
_PLATFORM = re.compile(r"[A-Za-z0-9._/-]{1,100}")
"""The source's words become an argument of the program: nothing there may mean anything to a shell or to QEMU."""
COMPLAINT_BYTES = 500
"""Of the program's last words."""


class QemuTemplate:
    """`within_s`: for the program, and then for its QEMU to be adopted."""

    def __init__(self, program: Path | None, vmms: Vmms, within_s: float) -> None:
        self._program = program
        self._vmms = vmms
        self._within_s = within_s

    async def start(self, vm: str, platform: str) -> None:
        """Raises: VmferryError DESTINATION_NO_VMM."""
        if self._program is None:
            return
        if not _PLATFORM.fullmatch(platform):
            raise _failed(f"the source names the platform of {vm} {platform[:100]!r}, not letters, digits and ._/-")
        await self._run(self._program, vm, platform)
        try:
            async with asyncio.timeout(self._within_s):
                while self._vmms.incoming(vm) is None:  # noqa: ASYNC110 the monitors are watched elsewhere
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as error:
            raise _failed(
                f"{self._program} ended well, and no QEMU of {vm} was adopted in {self._within_s:g} s"
            ) from error
        log.info(STARTED, vm=vm, program=str(self._program))

    async def _run(self, program: Path, vm: str, platform: str) -> None:
        """Its standard error is a file: a QEMU that it leaves behind may keep that open."""
        with tempfile.TemporaryFile() as complaint:
            try:
                process = await asyncio.create_subprocess_exec(
                    *(str(program), vm, platform),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=complaint,
                    start_new_session=True,
                )
            except OSError as error:
                raise _failed(f"{program} cannot be run: {error}") from error
            try:
                async with asyncio.timeout(self._within_s):
                    status = await process.wait()
            except TimeoutError as error:
                raise _failed(f"{program} {vm} did not end within {self._within_s:g} s") from error
            finally:
                if process.returncode is None:
                    process.kill()
            if status:
                complaint.seek(0)
                words = complaint.read().decode(errors="replace").strip()[-COMPLAINT_BYTES:]
                raise _failed(f"{program} {vm} ended with {status}: {words or 'no reason given'}")


def _failed(what: str) -> VmferryError:
    return VmferryError(
        Reason.DESTINATION_NO_VMM, f"no VMM waits on the destination: {what}.", "See [qemu] template there."
    )
