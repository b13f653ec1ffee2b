"""The process behind a socket, also in another pid namespace."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmferry.demo.patience import patient
from vmferry.vmm.process import is_known_as, peer_of, process_named, process_of_thread

APART = ("unshare", "--pid", "--fork", "--kill-child")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(tmp_path / "monitor"))
        made.listen()
        yield made


@pytest.fixture
def apart(listener: socket.socket) -> Iterator[int]:
    """A process that has the number 1 in its own namespace, and the listener."""
    if shutil.which("unshare") is None or subprocess.run([*APART, "true"], check=False).returncode:
        pytest.skip("no pid namespace can be made here: it needs root")
    words = ["sh", "-c", "echo here; exec sleep infinity"]
    with subprocess.Popen([*APART, *words], stdout=subprocess.PIPE, pass_fds=(listener.fileno(),)) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == b"here\n"
            children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            yield int(children[0])
        finally:
            outer.kill()
            outer.wait(patient(20.0))


def test_the_peer_of_a_connection(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(listener.getsockname())
        assert peer_of(client) == os.getpid()


def test_a_thread_of_the_peer(listener: socket.socket) -> None:
    own = os.getpid()
    assert process_of_thread(own, own, listener.getsockname()) == own
    assert process_of_thread(own, 0, listener.getsockname()) == own


def test_a_process_that_got_the_socket_from_another(listener: socket.socket) -> None:
    """libvirt makes the socket, and passes it to QEMU."""
    with subprocess.Popen(["sleep", "infinity"], pass_fds=(listener.fileno(),)) as heir:
        assert process_of_thread(heir.pid, os.getpid(), listener.getsockname()) == heir.pid
        heir.kill()


def test_a_thread_of_a_process_that_does_not_serve_the_socket(listener: socket.socket) -> None:
    """A number of another namespace may name any process of this one."""
    with subprocess.Popen(["sleep", "infinity"]) as stranger:
        assert process_of_thread(stranger.pid, os.getpid(), listener.getsockname()) is None
        stranger.kill()
    assert process_of_thread(1 << 22, os.getpid(), listener.getsockname()) is None


def test_a_process_in_another_pid_namespace(listener: socket.socket, apart: int) -> None:
    assert is_known_as(Path(f"/proc/{apart}"), 1)
    assert process_of_thread(1, os.getpid(), listener.getsockname()) == apart
    assert process_of_thread(1, apart, listener.getsockname()) == apart


def test_the_name_that_a_process_gives_itself(apart: int) -> None:
    assert process_named(apart, 1) == apart
    assert process_named(os.getpid(), 42) == 42
    assert process_named(0, 42) == 42
