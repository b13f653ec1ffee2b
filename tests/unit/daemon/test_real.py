"""The daemon as a program, with its real store, VMM socket and servers: start, answers, restart, stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.support.ports import free_ports
from vmferry.demo.patience import patient
from vmferry.v1 import machines_pb2, migrations_pb2
from vmferry.v1.machines_pb2_grpc import MachinesStub
from vmferry.v1.migrations_pb2_grpc import MigrationsStub

START_S = patient(60.0)


@dataclass
class Program:
    process: subprocess.Popen[str]
    api: str
    ops: str

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.ops}{path}", timeout=patient(10)) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=patient(60))
        return self.process.returncode, log


@contextmanager
def daemon(directory: Path) -> Iterator[Program]:
    api, peer, ops = (f"127.0.0.1:{port}" for port in free_ports(3))
    config = directory / "vmferryd.toml"
    config.write_text(
        f'runtime_dir = "{directory}/run"\nstate_dir = "{directory}/state"\npager.program = "{sys.executable}"\n'
        f'api.listen = "{api}"\npeer.listen = "{peer}"\nops.listen = "{ops}"\n'
    )
    source = Path(__file__).parents[3] / "src"
    with subprocess.Popen(
        [sys.executable, "-m", "vmferry.daemon", "--config", str(config)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    ) as process:
        try:
            with grpc.insecure_channel(api) as channel:
                grpc.channel_ready_future(channel).result(START_S)
            yield Program(process, api, ops)
        finally:
            if process.poll() is None:
                process.kill()


def events(log: str) -> list[str]:
    return [json.loads(line)["event"] for line in log.splitlines()]


def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    with daemon(tmp_path) as program:
        with grpc.insecure_channel(program.api) as channel:
            assert not MachinesStub(channel).ListMachines(machines_pb2.ListMachinesRequest()).machines
            request = migrations_pb2.CreateMigrationRequest(migration_id="m1", vm="none", destination="h:1")
            with pytest.raises(grpc.RpcError) as caught:
                MigrationsStub(channel).CreateMigration(request)
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert program.get("/healthz")[0] == 200
        assert "No VMM is connected." in program.get("/")[1]
        assert "vmferry_build_info" in program.get("/metrics")[1]
        status, text = program.get("/readyz")
        causes = [cause for cause in json.loads(text)["causes"] if not cause.startswith("userfaultfd")]
        assert causes == []
        assert status == (503 if json.loads(text)["causes"] else 200)
        code, log = program.stop()
    assert code == 0, log
    assert events(log)[0] == "daemon.starting"
    assert events(log)[-1] == "daemon.stopped"
    assert not (tmp_path / "run/vmm.sock").exists()


def test_a_killed_daemon_starts_again_on_its_state(tmp_path: Path) -> None:
    with daemon(tmp_path) as program:
        program.process.kill()
        program.process.wait()
    with daemon(tmp_path) as program:
        assert program.get("/api/v1/state")[0] == 200
        assert program.stop()[0] == 0


def test_a_watch_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    with daemon(tmp_path) as program, grpc.insecure_channel(program.api) as channel:
        watch = MigrationsStub(channel).WatchMigrations(migrations_pb2.WatchMigrationsRequest())
        stream = urllib.request.urlopen(f"http://{program.ops}/api/v1/events", timeout=patient(60))
        assert stream.readline().startswith(b"event: ")
        began = time.monotonic()
        assert program.stop()[0] == 0
        assert time.monotonic() - began < patient(30)
        stream.close()
        with pytest.raises(grpc.RpcError):
            list(watch)
