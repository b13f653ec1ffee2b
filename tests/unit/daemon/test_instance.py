"""The directories and the lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.daemon.instance import HostUnfit, InstanceLock, make_directory


def test_a_second_daemon_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    lock = InstanceLock(tmp_path)
    with pytest.raises(HostUnfit, match=f"process {os.getpid()}"):
        InstanceLock(tmp_path)
    lock.release()
    InstanceLock(tmp_path).release()


def test_the_lock_of_a_killed_daemon_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vmferry.daemon.instance import InstanceLock\n"
        "lock = InstanceLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(HostUnfit, match=str(holder.pid)):
            InstanceLock(tmp_path)
        holder.kill()
    InstanceLock(tmp_path).release()


def test_a_directory_is_made_with_its_mode(tmp_path: Path) -> None:
    make_directory(tmp_path / "a/b", "state_dir", 0o700)
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostUnfit, match=r"state_dir .*cannot be written"):
        make_directory(tmp_path / "file/x", "state_dir", 0o700)
    with pytest.raises(HostUnfit, match="runtime_dir /proc/x"):
        make_directory(Path("/proc/x"), "runtime_dir", 0o700)
