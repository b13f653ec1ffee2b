"""The destination's daemon starts the QEMU by the template of its host."""

from __future__ import annotations

import os
import shlex
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.qemu import CPU, Hosts, Qemu, make_image, memory_options, monitors
from tests.support.scenario.harness import ended, unique
from vmferry.demo.patience import patient
from vmferry.v1 import machines_pb2
from vmferry.v1 import migrations_pb2 as mg

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

MACHINE = "pc-i440fx-7.2"


async def test_a_vm_comes_to_a_host_that_starts_its_qemu(hosts: Hosts, qemu72: Qemu, tmp_path: Path) -> None:
    pair, vm = hosts.pair, unique("qemu template")
    image = await make_image(tmp_path, 96, 1, "random")
    memory = memory_options("memfd", MACHINE, tmp_path, vm)
    source = await hosts.start(pair.home, qemu72, vm, memory, image)
    await source.warm(image)
    pid = tmp_path / "pid"
    words = [
        *(*qemu72.argv, "-nodefaults", "-display", "none", "-cpu", CPU, "-smp", "1", *memory, *image.options),
        *("-S", "-incoming", "defer", "-daemonize", "-pidfile", str(pid)),
    ]
    template = tmp_path / "start-qemu"
    monitor = f'"unix:{monitors(pair.away)}/$1.qmp,server=on,wait=off"'
    check = f'[ "${{2##*/}}" = {MACHINE} ] || {{ echo "not $2" >&2; exit 1; }}'
    template.write_text(f'#!/bin/sh\n{check}\nexec {shlex.join(words)} -name "$1" -qmp {monitor}\n')
    template.chmod(0o755)
    lines = f'monitors = ["{monitors(pair.away)}/*.qmp"]\ntemplate = "{template}"'
    assert pair.away.process is not None
    await pair.away.process.stop()
    pair.away.write_config(qemu=lines)
    await pair.away.start()
    try:
        await pair.home_api.create(vm, vm, str(pair.away.place.peer))
        last = await ended(pair.home_api, vm, patient(120.0))
        assert last.phase == mg.PHASE_COMPLETED, last.reason
        await hosts.knows(pair.away, vm, machines_pb2.MACHINE_STATE_RUNNING)
        assert await source.process.ended(patient(30.0))
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
