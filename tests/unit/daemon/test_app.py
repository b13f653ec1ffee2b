"""The daemon's frame: start, readiness, stop, and the ends that nobody asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import http2
from tests.support.daemons import Running, running
from tests.support.scripted.daemon import ScriptedCore
from vmferry.daemon.app import ServiceReturned
from vmferry.daemon.instance import HostUnfit
from vmferry.demo.patience import patient
from vmferry.errors import Reason, VmferryError
from vmferry.peer.contract import PROTOCOL_VERSION
from vmferry.v1 import peer_pb2
from vmferry.v1.peer_pb2_grpc import PeerStub


async def until_ops(run: Running) -> None:
    async with asyncio.timeout(patient(30)):
        while True:
            try:
                await run.get("/healthz")
            except aiohttp.ClientError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_ready_only_when_everything_is(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        await until_ops(run)
        assert [cause.split(":")[0] for cause in await run.causes()] == ["vmm_socket", "api", "peer"]
        run.core.begin.set()
        await run.until_answering()
        assert not await run.serving()
        with socket.socket(socket.AF_UNIX) as vmm:
            vmm.bind(str(run.config.vmm_socket))
            vmm.listen()
            assert await run.causes() == []
            if (await run.get("/readyz"))[0] == 200:  # this machine has userfaultfd
                async with asyncio.timeout(patient(30)):
                    while not await run.serving():  # noqa: ASYNC110 - asked over the network
                        await asyncio.sleep(0.05)


async def test_the_peer_port_serves_peers_and_the_api_port_does_not(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        request = peer_pb2.HelloRequest(protocol_version=PROTOCOL_VERSION, migration="m1", job="0" * 32)
        async with grpc.aio.insecure_channel(str(run.config.peer)) as channel:
            assert (await PeerStub(channel).Hello(request)).host == "host-of-m1"
        async with grpc.aio.insecure_channel(str(run.config.api)) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await PeerStub(channel).Hello(request)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_signal_stops_it_gracefully(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(patient(30)):
            while "drain 60" not in run.core.story:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not await run.serving()
        assert not run.task.done()
        run.core.drained.set()
        await run.end()
        assert run.core.story == ["open", "started", "drain 60", "drained", "service cancelled", "closed"]


async def test_a_hangup_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        os.kill(os.getpid(), signal.SIGHUP)
        await run.until_answering()
        assert not run.task.done()
        assert "drain 60" not in run.core.story


async def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        run.daemon.ask_to_stop()
        run.daemon.ask_to_stop()
        await run.end()
        assert "hurried" in run.core.story


async def test_a_stop_before_it_has_started(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        await until_ops(run)
        run.core.drained.set()
        run.daemon.ask_to_stop()
        await run.end()
        assert "started" not in run.core.story


async def test_a_service_that_returns_is_a_fault(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        run.core.faults.put_nowait(None)
        with pytest.raises(ServiceReturned, match="'scripted'"):
            await run.end()
        assert run.core.story[-1] == "closed"


async def test_a_service_that_fails_ends_the_daemon_with_its_error(tmp_path: Path) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.faults.put_nowait(VmferryError(Reason.STORE_FAILED, "disk full"))
        with pytest.raises(VmferryError, match="disk full"):
            await run.end()


@pytest.mark.parametrize("key", ["api", "peer", "ops"])
async def test_an_address_in_use_is_named(tmp_path: Path, key: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = {key: {"listen": f"127.0.0.1:{holder.getsockname()[1]}"}}
        async with running(tmp_path, ScriptedCore(), **taken) as run:
            with pytest.raises(HostUnfit, match=rf"{holder.getsockname()[1]}.*cannot be listened on"):
                await run.end()
            assert run.core.story[-1] == "closed"


@pytest.mark.parametrize("port", ["api", "peer"])
@pytest.mark.parametrize("path", [b"/\xff", b"/vmferry.v1.Migrations/\xc3\x28", b"\x80"])
async def test_a_request_whose_path_is_not_text_closes_no_port(tmp_path: Path, port: str, path: bytes) -> None:
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        address = getattr(run.config, port)
        await http2.send(address.host, address.port, http2.request(path))
        async with grpc.aio.insecure_channel(str(run.config.api)) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
        async with grpc.aio.insecure_channel(str(run.config.peer)) as channel:
            await PeerStub(channel).Hello(
                peer_pb2.HelloRequest(protocol_version=PROTOCOL_VERSION, migration="m1", job="0" * 32)
            )
        assert not [cause for cause in await run.causes() if cause.startswith(("api", "peer"))]


@pytest.mark.parametrize("name", ["api", "peer"])
async def test_a_grpc_server_that_ends_by_itself_ends_the_daemon(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[grpc.aio.Server] = []
    make = grpc.aio.server

    def keep(*arguments: object, **options: object) -> grpc.aio.Server:
        made.append(make(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(grpc.aio, "server", keep)
    async with running(tmp_path, ScriptedCore()) as run:
        run.core.begin.set()
        await run.until_answering()
        await made[["api", "peer"].index(name)].stop(0)
        with pytest.raises(ServiceReturned, match=f"the {name} server ended"):
            await run.end()
