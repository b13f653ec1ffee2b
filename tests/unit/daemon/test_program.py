"""The program's arguments and exit codes: one clear line, no traceback."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.support.scripted.daemon import ScriptedCore
from vmferry.daemon.instance import InstanceLock
from vmferry.daemon.program import Exit, run

REFERENCE = Path(__file__).parents[3] / "docs/reference/configuration.md"


def write(directory: Path, text: str = "") -> Path:
    path = directory / "c.toml"
    head = f'runtime_dir = "{directory}/run"\nstate_dir = "{directory}/state"\n'
    ports = "".join(f'[{key}]\nlisten = "127.0.0.1:0"\n' for key in ("api", "peer", "ops"))
    path.write_text(head + (text or ports))
    return path


def start(*argv: str) -> Exit:
    return run(argv, ScriptedCore().assemble)


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--config", str(write(tmp_path)), "--check-config") is Exit.STOPPED
    assert "good" in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "checking starts nothing"


def test_every_problem_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "colour = 1\n[api]\nlisten = 5\n")
    assert start("--config", str(path)) is Exit.CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert any("colour" in line for line in lines) and any("api.listen" in line for line in lines)


def test_an_unreadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--config", str(tmp_path / "none")) is Exit.CONFIG
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--config"], ["--colour"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        start(*argv)
    assert caught.value.code == Exit.USAGE


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        start("--version")
    assert caught.value.code == 0
    assert re.match(r"vmferryd \S+\n", capsys.readouterr().out)


def test_a_directory_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'runtime_dir = "{tmp_path}"\nstate_dir = "/proc/x"\n')
    assert start("--config", str(path)) is Exit.HOST
    error = capsys.readouterr().err
    assert "state_dir /proc/x cannot be written" in error
    assert "Traceback" not in error


def test_a_second_daemon_on_the_same_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    lock = InstanceLock(tmp_path / "state")
    assert start("--config", str(write(tmp_path))) is Exit.HOST
    assert "Another vmferryd" in capsys.readouterr().err
    lock.release()


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        path = write(tmp_path, f'[ops]\nlisten = "127.0.0.1:{holder.getsockname()[1]}"\n'
                     '[api]\nlisten = "127.0.0.1:0"\n[peer]\nlisten = "127.0.0.1:0"\n')  # fmt: skip
        assert start("--config", str(path)) is Exit.HOST
    error = capsys.readouterr().err
    assert "Set [ops] listen" in error
    assert "Traceback" not in error


def test_a_fault_is_logged_as_one_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(ScriptedCore):
        async def started(self) -> None:
            raise RuntimeError("a bug")

    assert run(["--config", str(write(tmp_path))], Failing().assemble) is Exit.FAULT
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[-1]["event"] == "daemon.failed"
    assert "a bug" in json.dumps(lines[-1])


def test_the_reference_lists_the_exit_codes() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d) \|", REFERENCE.read_text(), re.MULTILINE)}
    assert documented == set(Exit)
