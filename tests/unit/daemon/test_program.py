"""The program's arguments and exit codes: one clear line, no traceback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripted.daemon import ScriptedCore
from vmferry.daemon import last_words
from vmferry.daemon.instance import InstanceLock
from vmferry.daemon.program import Exit, run
from vmferry.demo.patience import patient

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


def said(text: str) -> list[str]:
    """The errors of lines that are all JSON."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["event"] for line in lines} == {"daemon.not_started"}
    return [line["error"] for line in lines]


def test_a_start_that_fails_writes_json_where_the_log_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start("--config", str(tmp_path / "none"))
    assert "cannot be read" in said(capsys.readouterr().err)[0]
    start("--config", str(write(tmp_path, "colour = 1\n[api]\nlisten = 5\n")))
    assert len(said(capsys.readouterr().err)) == 2
    path = tmp_path / "c.toml"
    path.write_text(f'runtime_dir = "{tmp_path}"\nstate_dir = "/proc/x"\n[log]\nformat = "json"\n')
    start("--config", str(path))
    assert "state_dir /proc/x" in said(capsys.readouterr().err)[0]
    path.write_text(path.read_text().replace("json", "console"))
    start("--config", str(path))
    assert capsys.readouterr().err.startswith("vmferryd: state_dir /proc/x")
    path.write_text('colour = 1\n[log]\nformat = "console"\n')
    start("--config", str(path))
    assert capsys.readouterr().err.startswith(f"vmferryd: {path}: colour")


def test_a_check_writes_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--config", str(write(tmp_path, "colour = 1\n")), "--check-config") is Exit.CONFIG
    assert capsys.readouterr().err.startswith("vmferryd: ")


def test_a_lock_that_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state" / "lock").mkdir(parents=True)
    assert start("--config", str(write(tmp_path))) is Exit.HOST
    assert f"{tmp_path}/state/lock cannot be opened: Is a directory" in said(capsys.readouterr().err)[0]


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["--config", "/a"], Path("/a")),
        (["--colour", "--config=/a"], Path("/a")),
        (["--config"], None),
        ([], None),
    ],
)
def test_the_file_is_found_among_wrong_arguments(argv: list[str], path: Path | None) -> None:
    assert last_words.config_path(argv) == path


PROGRAM = "import sys; from vmferry.daemon import main; sys.exit(main())"


def program(*argv: str, code: str = PROGRAM) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    return subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("library", ["grpc", "structlog", "sqlalchemy"])
def test_a_library_that_cannot_be_loaded_is_a_line(tmp_path: Path, library: str) -> None:
    """None in sys.modules makes an import fail."""
    code = f"import sys; sys.modules[{library!r}] = None\n{PROGRAM}"
    with program("--config", str(write(tmp_path)), code=code) as child:
        error = child.communicate(timeout=patient(60))[1]
    assert child.returncode == Exit.FAULT
    assert library in said(error)[0]


@pytest.mark.parametrize("key", ["api", "peer"])
def test_a_grpc_port_in_use_is_a_line(tmp_path: Path, key: str) -> None:
    """gRPC's own core writes nothing."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        ports = {"api": 0, "peer": 0, "ops": 0, key: holder.getsockname()[1]}
        text = "".join(f'[{name}]\nlisten = "127.0.0.1:{port}"\n' for name, port in ports.items())
        with program("--config", str(write(tmp_path, text))) as child:
            error = child.communicate(timeout=patient(60))[1]
    assert child.returncode == Exit.HOST
    lines = [json.loads(line) for line in error.splitlines()]
    assert lines[-1]["event"] == "daemon.not_started"
    assert f"[{key}] listen" in lines[-1]["error"]


def test_ctrl_c_while_the_modules_load_ends_it_without_a_word(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
class Loading:
    def find_spec(self, name, path, target=None):
        if name == "sqlalchemy":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Loading())
{PROGRAM}
"""
    with program("--config", str(write(tmp_path)), code=code) as child:
        error = child.communicate(timeout=patient(60))[1]
    assert (child.returncode, error) == (-signal.SIGINT, "")
