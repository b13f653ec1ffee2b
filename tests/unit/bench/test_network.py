"""What connections of a run are paced by."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from vmferry_bench.network import ALLOWED, LANE_CONGESTION_CONTROL, congestion_control

from vmferry.demo.patience import patient

EXAMPLE = Path(__file__).parents[3] / "configs/vmferryd.toml"

INSIDE = """
import socket
from vmferry_bench.network import congestion_control, enter_own_network
why = enter_own_network()
if why:
    raise SystemExit(why)
listener = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(listener.getsockname()) as one, listener.accept()[0] as other:
    names = {end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) for end in (one, other)}
print(congestion_control(), *(name.rstrip(b"\\0").decode() for name in names))
"""


def test_all_connections_of_a_run_are_paced_as_lanes_are_and_those_of_the_host_as_before():
    before = congestion_control(), ALLOWED.read_text()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", INSIDE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=patient(60),
    )
    if "a network namespace: Operation not permitted" in run.stderr:
        pytest.skip(f"it can only be made by root: {run.stderr.strip()}")
    assert tomllib.loads(EXAMPLE.read_text())["pager"]["congestion_control"] == LANE_CONGESTION_CONTROL
    assert run.stdout.split() == [LANE_CONGESTION_CONTROL] * 2, run.stderr
    assert (congestion_control(), ALLOWED.read_text()) == before
