"""Lists the VMs that the daemon knows."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.client.plain import enum_word, plain, size_words
from vmferry.v1.machines_pb2 import Machine, MachineState

HELP = "list the VMs of this host"
COLUMNS = ("VM", "STATE", "MEMORY", "VCPUS", "PLATFORM", "MEMORY ERRORS", "MIGRATION", "PID")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: the verb has only the common options."""
    del parser


def row(machine: Machine) -> tuple[str, ...]:
    """One VM in the order of COLUMNS."""
    size = sum(region.size for region in machine.layout.regions)
    return (
        machine.vm,
        enum_word(MachineState.DESCRIPTOR, machine.state),
        size_words(size) if size else "",
        str(machine.vcpus or ""),
        machine.platform,
        str(machine.memory_errors),
        machine.migration_id,
        str(machine.vmm_pid or ""),
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        known = [machine async for machine in api.list_machines()]
    if output.as_json:
        for machine in known:
            output.event(plain(machine))
    else:
        output.table(COLUMNS, [row(machine) for machine in known], "no VM is known here")
    return ExitCode.OK
