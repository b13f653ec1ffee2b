"""A whole daemon in this process, around a scripted core."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.ports import free_ports
from tests.support.scripted.daemon import ScriptedCore
from vmferry.daemon.app import Daemon
from vmferry.daemon.config import Config, parse
from vmferry.demo.patience import patient


def make_config(directory: Path, **extra: object) -> Config:
    api, peer, ops = free_ports(3)
    values = {
        "host": "host-a",
        "runtime_dir": str(directory),
        "state_dir": str(directory),
        "pager": {"program": "sh"},
        "api": {"listen": f"127.0.0.1:{api}"},
        "peer": {"listen": f"127.0.0.1:{peer}"},
        "ops": {"listen": f"127.0.0.1:{ops}"},
    }
    return parse(values | extra, "host-a")


@dataclass
class Running:
    config: Config
    core: ScriptedCore
    daemon: Daemon
    task: asyncio.Task[None]

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.config.ops}{path}") as answer:
            return answer.status, await answer.text()

    async def causes(self) -> list[str]:
        found: list[str] = json.loads((await self.get("/readyz"))[1])["causes"]
        return [cause for cause in found if not cause.startswith("userfaultfd")]

    async def until_answering(self) -> None:
        async with grpc.aio.insecure_channel(str(self.config.api)) as channel, asyncio.timeout(patient(30)):
            await channel.channel_ready()

    async def serving(self) -> bool:
        async with grpc.aio.insecure_channel(str(self.config.api)) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def end(self) -> None:
        async with asyncio.timeout(patient(30)):
            await self.task


@asynccontextmanager
async def running(directory: Path, core: ScriptedCore, **extra: object) -> AsyncIterator[Running]:
    config = make_config(directory, **extra)
    daemon = Daemon(config, core.assemble, "1")
    task = asyncio.create_task(daemon.run())
    try:
        yield Running(config, core, daemon, task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
