"""Attaches a QEMU's memory to its pager (docs/reference/vmm-protocol.md, "Memory socket") in QEMU's place.

QEMU takes its machine checks from the kernel, so the pager's frames are read and dropped.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing
from vmferry.vmm.qemu.facts import Facts, HostMemory

FRAME_MAX = 64 << 10
DROP_BYTES = 4096


def handover(facts: Facts, vm: str, role: str, uffd: int | None) -> dict[str, Any]:
    """The message. `uffd`: index of the userfaultfd among its descriptors, behind the files of the regions."""
    message: dict[str, Any] = {
        "version": 1,
        "vm": vm,
        "role": role,
        "pid": facts.pid,
        "regions": [_region(one) for one in facts.memory],
    }
    if uffd is not None:
        message["uffd"] = uffd
    return message


def _region(one: HostMemory) -> dict[str, Any]:
    region: dict[str, Any] = {
        "gpa": one.region.gpa,
        "base_host_virt_addr": one.hva,
        "size": one.region.size,
        "page_size": one.page_size,
        "backing": one.backing.value,
    }
    if one.backing is Backing.MEMFD:
        region |= {"fd": one.file, "offset": one.offset}
    return region


class MemoryLink:
    """The connection to the pager. It must stay open as long as the pager serves this memory."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        self.path = path
        self._connection = connection
        self._reading = asyncio.create_task(self._drop_frames(), name="qemu.memory")

    @classmethod
    async def attach(
        cls, path: Path, message: dict[str, Any], descriptors: Sequence[int], within_s: float
    ) -> MemoryLink:
        """Raises: VmferryError VMM_REFUSED with the pager's reason, VMM_TIMEOUT."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(within_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
                socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors))
                answer = await _frame(connection)
        except TimeoutError as error:
            connection.close()
            raise VmferryError(
                Reason.VMM_TIMEOUT, f"The pager at {path} did not take QEMU's memory within {within_s:g} s.", ""
            ) from error
        except (OSError, ValueError) as error:
            connection.close()
            raise VmferryError(
                Reason.PAGER_FAILED, f"QEMU's memory could not be attached at {path}: {error}."
            ) from error
        except BaseException:
            connection.close()
            raise
        if answer.get("type") != "attached":
            connection.close()
            why = f"{answer.get('field')}: {answer.get('message')}"
            raise VmferryError(Reason.VMM_REFUSED, f"The pager at {path} refuses QEMU's memory: {why}.")
        return cls(path, connection)

    @property
    def lives(self) -> bool:
        return not self._reading.done()

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._connection.close()

    async def _drop_frames(self) -> None:
        with suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._connection, DROP_BYTES):
                pass


async def _frame(connection: socket.socket) -> dict[str, Any]:
    """Raises: OSError, ValueError."""
    size = int.from_bytes(await _exactly(connection, 4), "big")
    if size > FRAME_MAX:
        raise ValueError(f"a frame of {size} bytes")
    value = json.loads(await _exactly(connection, size))
    if not isinstance(value, dict):
        raise ValueError("a frame that is no object")  # noqa: TRY004 what came is malformed
    return value


async def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not more:
            raise ConnectionResetError("the pager closed the connection")
        data += more
    return data
