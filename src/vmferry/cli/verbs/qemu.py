"""Prints the command that starts a QEMU on the destination of an adopted VM."""

from __future__ import annotations

import argparse
import shlex

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.client.api import open_api
from vmferry.vmm.qemu.command import destination_command
from vmferry.vmm.qemu.libvirt import waiting_domain

HELP = "print the command of a QEMU that waits for a VM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("destination-command",), help="the command to print")
    parser.add_argument("--vm", metavar="NAME", required=True, help="name of the adopted VM")
    parser.add_argument(
        "--libvirt",
        metavar="FILE",
        type=argparse.FileType(),
        help="the VM's domain (`virsh dumpxml --migratable`; - reads it from standard input): print the waiting domain",
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        found = await api.check_qemu(args.vm)
    if args.libvirt is not None:
        domain = waiting_domain(args.libvirt.read(), found.profile.machine_type)
        if output.as_json:
            output.event({"domain": domain})
        else:
            output.text(domain)
        return ExitCode.OK
    command = destination_command(found.command, found.profile.machine_type)
    if output.as_json:
        output.event({"command": command})
    else:
        output.text(shlex.join(command))
    return ExitCode.OK
