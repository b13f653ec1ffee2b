"""Makes a small certificate authority and certificates of it, for a lab. A fleet brings its own authority."""

from __future__ import annotations

import argparse
import datetime as dt
import re
from pathlib import Path

from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.output import Output
from vmferry.errors import Reason, VmferryError
from vmferry.model.names import HOST_NAME
from vmferry.security.credentials import CredentialFiles
from vmferry.security.names import DEFAULT_DOMAIN, TRUST_DOMAIN, host_id
from vmferry.security.pki import Authority

HELP = "make certificates for a lab"
DAYS = 90.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("do", choices=("init", "issue", "revoke"), help="the authority, a certificate, its end")
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="the authority's directory")
    parser.add_argument("--domain", metavar="DOMAIN", default=DEFAULT_DOMAIN, help=f"trust domain ({DEFAULT_DOMAIN})")
    parser.add_argument("--host", metavar="NAME", help="issue, revoke: the certificate of a host (its `host` setting)")
    parser.add_argument("--user", metavar="NAME", help="issue, revoke: the certificate of a caller of the API")
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="issue: an IP address or DNS name by which jobs and users name the host; may be repeated",
    )
    parser.add_argument("--days", metavar="DAYS", type=float, default=DAYS, help=f"issue: its life ({DAYS:g})")


async def run(args: argparse.Namespace, output: Output) -> ExitCode:
    _check_names(args)
    if args.do == "init":
        authority = Authority.init(args.directory)
        output.text(f"authority: {authority.certificate}")
        return ExitCode.OK
    authority, name = Authority(args.directory), args.host or f"user-{args.user}"
    if args.do == "revoke":
        authority.revoke(authority.files(name).cert)
        output.text(f"revoked: {name}, in {authority.revocations}")
        return ExitCode.OK
    uri = host_id(args.domain, args.host) if args.host else f"spiffe://{args.domain}/vmferry/user/{args.user}"
    files = authority.issue(name, uri, args.address, lasts=dt.timedelta(days=args.days))
    _say(files, uri, output)
    return ExitCode.OK


def _check_names(args: argparse.Namespace) -> None:
    """Raises: VmferryError INVALID_ARGUMENT."""
    if re.fullmatch(TRUST_DOMAIN, args.domain) is None:
        raise VmferryError(Reason.INVALID_ARGUMENT, f"--domain: {args.domain!r} is no SPIFFE trust domain.")
    if args.do == "init":
        return
    name = args.host or args.user
    if (args.host is None) == (args.user is None) or re.fullmatch(HOST_NAME, name) is None:
        raise VmferryError(
            Reason.INVALID_ARGUMENT,
            "--host or --user: one of them must have a name of letters, digits, '.', '_' and '-'.",
            "E.g. `vmferry pki issue DIRECTORY --host host-a --address 10.0.0.1`.",
        )


def _say(files: CredentialFiles, uri: str, output: Output) -> None:
    paths = {"cert": str(files.cert), "key": str(files.key), "ca": str(files.ca), "crl": str(files.crl)}
    if output.as_json:
        output.event({"uri": uri, **paths})
        return
    output.text(f"# {uri}")
    for key, path in paths.items():
        output.text(f'{key} = "{path}"')
