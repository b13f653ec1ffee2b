# ruff: noqa: ASYNC110 these tests poll the daemon from outside
"""A daemon with TLS: each kind of stranger is refused, with a cause in the log and the metric, and nothing changes."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemons import Running, running
from tests.support.scripted.daemon import ScriptedCore
from tests.support.tls import (
    DOMAIN,
    Unchecked,
    early_files,
    environment,
    expired_files,
    host_files,
    section,
    user_files,
)
from vmferry.client.api import open_api
from vmferry.client.refusal import ApiError, RefusedError, UnreachableError
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.ops.state import State
from vmferry.peer.client import GrpcPeer, GrpcPeers
from vmferry.security.credentials import CredentialFiles
from vmferry.security.identity import Identity
from vmferry.security.names import host_id
from vmferry.security.pki import Authority

JOB = "0123456789abcdef" * 2
ALICE = f"spiffe://{DOMAIN}/vmferry/user/alice"
ACCESS = {"operator": [ALICE], "viewer": [f"spiffe://{DOMAIN}/vmferry/user/*"], "admin": ["user:root"]}


class Core(ScriptedCore):
    """It keeps the sources that were admitted."""

    def __init__(self) -> None:
        super().__init__()
        self.begin.set()
        self.drained.set()
        self.admitted: list[tuple[str, str | None]] = []
        self.incoming.admit = self._admit
        self.incoming.hello = self._hello
        self.state.state = self._state

    async def _admit(self, migration: str, _job: str, source: str | None = None) -> None:
        if migration == "of-a" and source != "a":
            raise VmferryError(Reason.PERMISSION_DENIED, f"of-a comes from another host than {source}.")
        self.admitted.append((migration, source))

    async def _hello(self, migration: str) -> str:
        return "b"

    async def _state(self) -> State:
        assert self.security is not None
        return State("b", 0, security=self.security.view())


@asynccontextmanager
async def secured(directory: Path, authority: Authority, **extra: object) -> AsyncIterator[tuple[Running, Core]]:
    """The daemon of the host `b`, with its own copy of the files."""
    files = host_files(authority, "b")
    own = CredentialFiles(*(directory / path.name for path in (files.cert, files.key, files.ca)), files.crl)
    for path in (files.cert, files.key, files.ca):
        (directory / path.name).write_bytes(path.read_bytes())
        (directory / path.name).chmod(0o600)
    core = Core()
    values = {"host": "b", "tls": section(own), "access": ACCESS} | extra
    async with running(directory, core, **values) as run:
        await until_bound(run)
        yield run, core


async def until_bound(run: Running) -> None:
    async with asyncio.timeout(patient(30)):
        while not run.core.story or run.core.story[-1] != "started":
            await asyncio.sleep(0.01)
            if run.task.done():
                run.task.result()


def peer_to(run: Running, identity: Identity | None) -> GrpcPeer:
    return GrpcPeers("a", identity=identity).connect(str(run.config.peer), JOB)


async def refusals(run: Running) -> dict[tuple[str, str], int]:
    _, text = await run.get("/metrics")
    found = {}
    for line in text.splitlines():
        if line.startswith("vmferry_refusals_total{"):
            labels = dict(part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(","))
            found[labels["port"].strip('"'), labels["cause"].strip('"')] = int(float(line.rsplit(" ", 1)[1]))
    return found


def audit(run: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.config.state_dir / "audit.log").read_text().splitlines()]


async def test_a_host_of_the_domain_is_admitted_under_its_own_name(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, core):
        peer = peer_to(run, Identity(host_files(authority, "a"), DOMAIN, "a"))
        assert await peer.hello("m1") == "b"
        assert core.admitted == [("m1", "a")]
        await peer.close()


async def test_the_metrics_tell_the_time_that_the_certificate_has_left(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, _):
        _, text = await run.get("/metrics")
        left = next(line for line in text.splitlines() if line.startswith("vmferry_certificate_left_seconds "))
        assert 80 < float(left.split()[1]) / 86400 <= 90


Strange = Callable[[Authority, Path], Identity | None]
STRANGERS: dict[str, tuple[Strange, str]] = {
    "another authority": (
        lambda ca, path: Identity(
            replace(host_files(Authority.init(path / "other"), "a"), ca=_both(ca, path), crl=None), DOMAIN, "a"
        ),
        "unknown_authority",
    ),
    "expired": (lambda ca, _: Unchecked(expired_files(ca, "a"), DOMAIN, "a"), "expired"),
    "not yet valid": (lambda ca, _: Unchecked(early_files(ca, "a"), DOMAIN, "a"), "not_yet_valid"),
    "revoked": (lambda ca, _: Identity(_revoked(ca), DOMAIN, "r"), "revoked"),
    "plain": (lambda _ca, _path: None, "not_tls"),
}


def _both(authority: Authority, path: Path) -> Path:
    """The stranger itself trusts both authorities."""
    both = path / "both.crt"
    both.write_bytes(authority.certificate.read_bytes() + (path / "other" / "ca.crt").read_bytes())
    return both


def _revoked(authority: Authority) -> CredentialFiles:
    files = host_files(authority, "r")
    authority.revoke(files.cert)
    return replace(files, crl=None)


@pytest.mark.parametrize("kind", STRANGERS)
async def test_a_stranger_is_refused_with_its_cause(tmp_path: Path, authority: Authority, kind: str) -> None:
    make, cause = STRANGERS[kind]
    async with secured(tmp_path, authority) as (run, core):
        peer = peer_to(run, make(authority, tmp_path))
        with pytest.raises(VmferryError) as caught:
            await peer.hello("m1")
        await peer.close()
        assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
        assert core.admitted == []
        assert ("peer", cause) in await refusals(run)


@pytest.mark.parametrize("name", ["user:alice", "no name", "another domain", "two hosts"])
async def test_a_certificate_that_names_no_host_may_call_nothing_of_hosts(
    tmp_path: Path, authority: Authority, name: str
) -> None:
    files = {
        "user:alice": lambda: user_files(authority, "alice"),
        "no name": lambda: authority.issue("odd", "https://a"),
        "another domain": lambda: authority.issue("odd", host_id("other.domain", "a")),
        "two hosts": lambda: authority.issue("odd", host_id(DOMAIN, "a") + "/b"),
    }[name]()
    async with secured(tmp_path, authority) as (run, core):
        peer = peer_to(run, Identity(files, DOMAIN))
        with pytest.raises(VmferryError) as caught:
            await peer.hello("m1")
        await peer.close()
        assert caught.value.reason is Reason.PERMISSION_DENIED
        assert core.admitted == []
        assert (await refusals(run))["peer", "not_permitted"] >= 1


async def test_another_hosts_certificate_acts_on_no_migration_but_its_own(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, core):
        peer = peer_to(run, Identity(host_files(authority, "c"), DOMAIN, "c"))
        for call in (peer.hello("of-a"), peer.start("of-a"), peer.refuse("of-a", "no"), peer.finish("of-a")):
            with pytest.raises(VmferryError) as caught:
                await call
            assert caught.value.reason is Reason.PERMISSION_DENIED
        await peer.close()
        assert core.admitted == []
        assert (await refusals(run))["peer", "foreign_migration"] == 4
        assert {line["outcome"] for line in audit(run)} == {"PERMISSION_DENIED"}
        assert {line["who"] for line in audit(run)} == {host_id(DOMAIN, "c")}


async def test_a_destination_with_another_address_or_host_gets_no_call(tmp_path: Path, authority: Authority) -> None:
    files = authority.issue("b2", host_id(DOMAIN, "b"), ["10.9.9.9"])
    async with secured(tmp_path, authority, tls=section(files)) as (run, core):
        peer = peer_to(run, Identity(host_files(authority, "a"), DOMAIN, "a"))
        with pytest.raises(VmferryError, match=r"not for the address 127\.0\.0\.1"):
            await peer.hello("m1")
        await peer.close()
        assert core.admitted == []


async def test_a_client_of_tls_1_2_is_refused(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, _):
        files = host_files(authority, "a")
        context = ssl.create_default_context(cafile=files.ca)
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.cert, files.key)
        for port in (run.config.api, run.config.peer):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(port.host, port.port, ssl=context)
        assert {("api", "old_tls"), ("peer", "old_tls")} <= set(await refusals(run))


async def test_a_client_without_a_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, _):
        context = ssl.create_default_context(cafile=authority.certificate)
        context.check_hostname = False
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError, asyncio.IncompleteReadError)):
            reader, _ = await asyncio.open_connection(run.config.peer.host, run.config.peer.port, ssl=context)
            await reader.readexactly(1)
        assert ("peer", "no_certificate") in await refusals(run)


async def test_a_tls_client_of_a_plain_port_says_so(tmp_path: Path, authority: Authority) -> None:
    core = Core()
    async with running(tmp_path, core) as run:
        await until_bound(run)
        peer = peer_to(run, Identity(host_files(authority, "a"), DOMAIN, "a"))
        with pytest.raises(VmferryError) as caught:
            await peer.hello("m1")
        await peer.close()
        assert caught.value.reason is Reason.DESTINATION_UNREACHABLE
        assert core.admitted == []


async def test_the_api_asks_for_a_role_and_writes_the_audit_log(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, _):
        address = str(run.config.api)
        async with open_api(address, patient(10), environment(user_files(authority, "alice"))) as api:
            with pytest.raises(RefusedError) as caught:
                await api.cancel("m1")
            assert caught.value.reason != "PERMISSION_DENIED"
        async with open_api(address, patient(10), environment(user_files(authority, "eve"))) as api:
            with pytest.raises(RefusedError) as caught:
                await api.cancel("m1")
            assert caught.value.reason == "PERMISSION_DENIED"
            assert [job async for job in api.list_migrations()] == []
        with pytest.raises(ApiError):
            async with open_api(address, patient(10), environment(host_files(authority, "c"))) as api:
                await api.migration("m1")
        lines = [(line["who"], line["call"].rsplit("/")[-1], line["on"], line["outcome"]) for line in audit(run)]
        assert lines[0][:3] == (ALICE, "CancelMigration", {"migration_id": "m1"})
        assert lines[0][3] != "PERMISSION_DENIED"
        assert (ALICE.replace("alice", "eve"), "CancelMigration", {"migration_id": "m1"}, "PERMISSION_DENIED") in lines
        assert all(line["from"].startswith("127.0.0.1:") for line in audit(run))
        assert (run.config.state_dir / "audit.log").stat().st_mode & 0o777 == 0o600


async def test_a_unix_user_has_the_roles_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    extra = {"api": {"listen": "127.0.0.1:0", "socket": str(path)}, "access": {"viewer": ["user:root"], "admin": []}}
    core = Core()
    async with running(tmp_path, core, **extra) as run:
        await until_bound(run)
        async with open_api(f"unix:{path}", patient(10), {}) as api:
            if os.geteuid() == 0:
                assert [job async for job in api.list_migrations()] == []
            with pytest.raises(RefusedError) as caught:
                await api.cancel("m1")
            assert caught.value.reason == "PERMISSION_DENIED"
        assert audit(run)[-1]["from"] == "unix"


async def test_the_servers_own_socket_admits_nobody(tmp_path: Path, authority: Authority) -> None:
    """A connection that did not come by an entrance has no caller, so no rights."""
    async with secured(tmp_path, authority) as (run, core):
        for name in ("api.grpc", "peer.grpc"):
            assert (run.config.runtime_dir / name).exists()
        peer = GrpcPeers("a").connect(f"unix:{run.config.runtime_dir / 'peer.grpc'}", JOB)
        with pytest.raises(VmferryError) as caught:
            await peer.hello("m1")
        await peer.close()
        assert caught.value.reason is Reason.PERMISSION_DENIED
        assert core.admitted == []


async def test_new_files_count_for_new_connections_and_open_ones_continue(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, core):
        identity = Identity(host_files(authority, "a"), DOMAIN, "a")
        peer = peer_to(run, identity)
        await peer.hello("m1")
        soon = authority.issue("b-next", host_id(DOMAIN, "b"), ["127.0.0.1"], lasts=dt.timedelta(days=3))
        (tmp_path / "b.key").write_bytes(soon.key.read_bytes())
        half_done = peer_to(run, identity)
        await half_done.hello("m2")  # The certificate does not fit its key: the former one stays in use.
        await half_done.close()
        (tmp_path / "b.crt").write_bytes(soon.cert.read_bytes())
        after = peer_to(run, identity)
        await after.hello("m3")
        await after.close()
        await peer.hello("m4")
        await peer.close()
        assert [migration for migration, _ in core.admitted] == ["m1", "m2", "m3", "m4"]
        async with asyncio.timeout(patient(30)):
            while "vmferry_certificate_left_seconds 2" not in (await run.get("/metrics"))[1]:
                await asyncio.sleep(0.1)


async def test_a_connection_outlives_its_certificate(tmp_path: Path, authority: Authority) -> None:
    short = authority.issue("a-short", host_id(DOMAIN, "a"), lasts=dt.timedelta(seconds=patient(3)))
    async with secured(tmp_path, authority) as (run, core):
        identity = Unchecked(short, DOMAIN, "a")
        peer = peer_to(run, identity)
        await peer.hello("m1")
        while identity.days_left() > 0:
            await asyncio.sleep(0.2)
        await peer.hello("m2")
        await peer.close()
        late = peer_to(run, identity)
        with pytest.raises(VmferryError):
            await late.hello("m3")
        await late.close()
        assert [migration for migration, _ in core.admitted] == ["m1", "m2"]
        assert ("peer", "expired") in await refusals(run)


async def test_idle_connections_are_limited_and_others_are_served(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, core):
        idle = []
        for _ in range(150):
            idle.append(socket.create_connection((run.config.peer.host, run.config.peer.port)))
            await asyncio.sleep(0)
        async with asyncio.timeout(patient(30)):
            while (await refusals(run)).get(("peer", "too_many"), 0) < 150 - 64:
                await asyncio.sleep(0.05)
        async with open_api(str(run.config.api), patient(10), environment(user_files(authority, "alice"))) as api:
            assert [job async for job in api.list_migrations()] == []
        for one in idle:
            one.close()
        peer = peer_to(run, Identity(host_files(authority, "a"), DOMAIN, "a"))
        async with asyncio.timeout(patient(30)):
            while not core.admitted:
                try:
                    await peer.hello("m1")
                except VmferryError:
                    await asyncio.sleep(0.1)
        await peer.close()


async def test_no_certificate_in_the_environment_says_how_to_get_one(tmp_path: Path, authority: Authority) -> None:
    async with secured(tmp_path, authority) as (run, _):
        with pytest.raises(UnreachableError, match="VMFERRY_KEY is not set"):
            async with open_api(str(run.config.api), 1.0, {"VMFERRY_CERT": "/x"}):
                pass
        async with open_api(str(run.config.api), patient(5), {}) as api:
            with pytest.raises(UnreachableError):
                await api.migration("m1")


async def test_the_socket_of_a_dial_serves_this_process_alone(authority: Authority, tmp_path: Path) -> None:
    async with secured(tmp_path, authority) as (run, core):
        peer = peer_to(run, Identity(host_files(authority, "a"), DOMAIN, "a"))
        assert peer._tunnel is not None
        name = peer._tunnel.target.removeprefix("unix-abstract:")
        other = await asyncio.create_subprocess_exec(
            "python3",
            "-c",
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0{name}'); print(len(s.recv(1)))",
            stdout=asyncio.subprocess.PIPE,
        )
        answer, _ = await other.communicate()
        assert answer == b"0\n"
        await peer.close()
        assert core.admitted == []
