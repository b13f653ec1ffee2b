"""Starts moving a VM to another host. With --watch, follows the migration to its end."""

from __future__ import annotations

import argparse
import re
import secrets

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.cli.values import peer_address, push_limit
from vmferry.cli.verbs import watch
from vmferry.client.api import Api, open_api
from vmferry.client.follow import TERMINAL_PHASES
from vmferry.client.plain import plain
from vmferry.client.progress import phase_word
from vmferry.v1.migrations_pb2 import Migration

HELP = "move a VM to another host"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vm", metavar="VM", help="name of the VM")
    parser.add_argument(
        "--to", metavar="HOST[:PORT]", required=True, type=peer_address, help="peer address of the host; port 7601"
    )
    parser.add_argument("--dry-run", action="store_true", help="check VM, request and destination; start nothing")
    parser.add_argument("--id", metavar="ID", help="id of the migration; the same id with the same VM is the same job")
    parser.add_argument(
        "--push-limit",
        metavar="RATE",
        type=push_limit,
        help="most that the background push may send, such as 200MiB/s; none: no limit (default: as the daemon is "
        "configured). Demand is never held back",
    )
    parser.add_argument("--watch", action="store_true", help="follow the migration to its end")


def new_id(vm: str) -> str:
    """A free id in the form that the API requires, with the VM's name in it."""
    slug = re.sub(r"[^a-z0-9]+", "-", vm.lower()).strip("-")[:40].rstrip("-")
    if not slug or not slug[0].isalpha():
        slug = f"vm-{slug}".rstrip("-")
    return f"{slug}-{secrets.token_hex(4)}"


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    async with open_api(args.api, args.timeout) as api:
        if args.dry_run:
            return await _check(api, args, output)
        migration = await _create(api, args)
        if args.watch:
            return await watch.follow(api, migration.migration_id, output)
    if output.as_json:
        output.event(plain(migration))
    else:
        output.text(f"{migration.migration_id}: {phase_word(migration)}")
    return ExitCode.OK


async def _check(api: Api, args: argparse.Namespace, output: Output) -> ExitCode:
    answer = await api.check_create(args.vm, args.to, args.push_limit or 0)
    if output.as_json:
        output.event(plain(answer))
    else:
        output.text(f"{args.vm} can be moved; {answer.destination_host} answers at {args.to}. Nothing was started.")
    return ExitCode.OK


async def _create(api: Api, args: argparse.Namespace) -> Migration:
    """Sets "none" by a second call if the daemon has a configured limit: in the request, 0 means that limit."""
    migration = await api.create(args.id or new_id(args.vm), args.vm, args.to, args.push_limit or 0)
    if args.push_limit == 0 and migration.push_bytes_per_s and migration.phase not in TERMINAL_PHASES:
        migration = await api.set_push_limit(migration.migration_id, 0)
    return migration
