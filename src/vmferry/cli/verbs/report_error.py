"""Reports a memory error that the daemon cannot see itself, for example one from EDAC."""

from __future__ import annotations

import argparse

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import address, block_bits
from vmferry.client.api import open_api
from vmferry.client.plain import plain
from vmferry.units import LSB_4K

HELP = "report a memory error of a VM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="name of the VM")
    parser.add_argument(
        "--gpa", metavar="ADDRESS", required=True, type=address, help="guest-physical address of any byte, 0x…"
    )
    parser.add_argument(
        "--lsb", metavar="BITS", type=block_bits, default=LSB_4K, help="log2 of the bad block's size (12: 4 KiB)"
    )


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        error = await api.report_error(args.vm, args.gpa - args.gpa % (1 << args.lsb), args.lsb)
    if output.as_json:
        output.event(plain(error))
    else:
        times = "once" if error.count == 1 else f"{error.count} times"
        output.text(f"{args.vm}: {error.gpa:#x} is recorded, seen {times}")
    return ExitCode.OK
