"""Adopts a QEMU that runs or waits as it is, or checks whether an adopted one can be moved."""

from __future__ import annotations

import argparse
from pathlib import Path

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import host_port
from vmferry.client.api import open_api
from vmferry.client.plain import enum_word, plain
from vmferry.v1.qemus_pb2 import QEMU_FINDING_WEIGHT_REFUSED, CheckQemuResponse, QemuFindingWeight

HELP = "adopt a QEMU, or check whether it can be moved"
COLUMNS = ("WEIGHT", "FINDING", "REMEDY")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--qmp", metavar="SOCKET", type=Path, help="adopt the QEMU of this monitor socket")
    action.add_argument("--check", metavar="VM", help="check an adopted VM; changes nothing")
    parser.add_argument("--vm", metavar="NAME", default="", help="with --qmp: the VM's name (default: QEMU's -name)")
    parser.add_argument(
        "--to", metavar="HOST:PORT", type=host_port, help="with --check: API of the host whose QEMU waits for the VM"
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    if args.qmp is not None:
        return await _adopt(args, output)
    found = await _check(args)
    if output.as_json:
        output.event(plain(found))
    else:
        rows = [(enum_word(QemuFindingWeight.DESCRIPTOR, one.weight), one.fact, one.remedy) for one in found.findings]
        output.table(COLUMNS, rows, f"{args.check}: nothing speaks against a move")
    refused = any(one.weight == QEMU_FINDING_WEIGHT_REFUSED for one in found.findings)
    return ExitCode.REFUSED if refused else ExitCode.OK


async def _adopt(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        adopted = await api.adopt_qemu(str(args.qmp.absolute()), args.vm)
    if output.as_json:
        output.event(plain(adopted))
    else:
        output.text(f"{adopted.vm}: adopted, {adopted.state} (pid {adopted.vmm_pid})")
    return ExitCode.OK


async def _check(args: argparse.Namespace) -> CheckQemuResponse:
    """With --to: the findings of both hosts and their differences."""
    async with open_api(args.api, args.timeout) as api:
        if args.to is None:
            return await api.check_qemu(args.check)
        async with open_api(args.to, args.timeout) as there:
            waiting = await there.check_qemu(args.check)
        found = await api.check_qemu(args.check, waiting.profile)
    found.findings.extend(waiting.findings)
    return found
