"""Attaches a QEMU's memory to its pager (docs/reference/vmm-protocol.md, "Memory socket") in QEMU's place.

The message names QEMU's process: its memory lives as long as that, whatever becomes of this daemon.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmferry.errors import Reason, VmferryError
from vmferry.model.memory import Backing
from vmferry.vmm.qemu.facts import Facts, HostMemory

FRAME_MAX = 64 << 10


def handover(facts: Facts, vm: str, role: str, files: int) -> dict[str, Any]:
    """The message. Its descriptors are the files of the regions, the process, and a destination's userfaultfd."""
    message: dict[str, Any] = {
        "version": 1,
        "vm": vm,
        "role": role,
        "pid": facts.pid,
        "process": files,
        "regions": [_region(one) for one in facts.memory],
    }
    if role == "destination":
        message["uffd"] = files + 1
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


async def attach(path: Path, message: dict[str, Any], descriptors: Sequence[int], within_s: float) -> None:
    """Returns once the pager has the memory. Raises: VmferryError VMM_REFUSED with the pager's reason, VMM_TIMEOUT."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as connection:
        try:
            async with asyncio.timeout(within_s):
                await asyncio.get_running_loop().sock_connect(connection, str(path))
                socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors))
                answer = await _frame(connection)
        except TimeoutError as error:
            raise VmferryError(
                Reason.VMM_TIMEOUT, f"The pager at {path} did not take QEMU's memory within {within_s:g} s.", ""
            ) from error
        except (OSError, ValueError) as error:
            what = f"QEMU's memory could not be attached at {path}: {error}."
            raise VmferryError(Reason.PAGER_FAILED, what) from error
    if answer.get("type") != "attached":
        why = f"{answer.get('field')}: {answer.get('message')}"
        raise VmferryError(Reason.VMM_REFUSED, f"The pager at {path} refuses QEMU's memory: {why}.")


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
