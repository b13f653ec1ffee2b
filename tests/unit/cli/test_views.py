"""The verbs that show migrations: both directions, problems first, causes and commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.support.scripted.cli import COURSE, revision
from vmferry.cli import main
from vmferry.cli.arguments import VERBS
from vmferry.cli.exit_codes import ExitCode
from vmferry.v1 import common_pb2, migrations_pb2, problems_pb2

PROGRAM = "import sys; from vmferry.cli import main; sys.exit(main())"


def at(seconds):
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp


def paused():
    now = time.time()
    waits = int((now - 2174) * 1e6)
    return revision(
        4,
        migrations_pb2.PHASE_POSTCOPY_PAUSED,
        direction=migrations_pb2.DIRECTION_IN,
        source_host="host-a",
        destination_host="host-b",
        phase_time=at(now - 2174),
        create_time=at(now - 2200),
        reason_code="PAGER_FAILED",
        reason="the source's pager (host-a, pid 3480) was killed by SIGKILL",
        progress=common_pb2.PageProgress(total=100, absent=98, waiting_faults=2, oldest_fault_since_us=waits),
        command="vmferry show m1",
        runbook="docs/reference/runbook.md#pager_failed",
        events=[migrations_pb2.MigrationEvent(time=at(0), host="host-a", kind="pager_ended", words="killed")],
    )


@pytest.mark.usefixtures("daemon")
def test_show_tells_guest_cause_and_command(script, capsys):
    script.migrations = {"m1": paused()}
    assert main(["show", "m1"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert re.match(r"web-1  POSTCOPY_PAUSED for 36m\d\ds  host-a → host-b  m1\n", out)
    for words in (
        "why       the source's pager (host-a, pid 3480) was killed by SIGKILL  [PAGER_FAILED]",
        "guest     2 vCPUs wait, oldest 36m",
        "memory    2 %  2 of 100 pages",
        "now       vmferry show m1   see docs/reference/runbook.md#pager_failed",
        "event     00:00:00.000Z  host-a  pager_ended  killed",
    ):
        assert words in out, words


@pytest.mark.usefixtures("daemon")
def test_list_shows_both_directions_and_problems_first(script, capsys):
    script.migrations = {
        "m9": migrations_pb2.Migration(
            migration_id="m9", vm="db", phase=migrations_pb2.PHASE_POSTCOPY, destination_host="host-c"
        )
    }
    script.incoming = [paused()]
    assert main(["list"]) == ExitCode.OK
    first, second = [line for line in capsys.readouterr().out.splitlines() if "POSTCOPY" in line]
    assert re.split(r"\s{2,}", first.strip())[:5] == ["m1", "web-1", "← host-a", "POSTCOPY_PAUSED", "2 %"]
    assert "→ host-c" in second
    assert main(["list", "-o", "name"]) == ExitCode.OK
    assert capsys.readouterr().out == "m1\nm9\n"
    assert main(["list", "-o", "wide"]) == ExitCode.OK
    assert "PAGER_FAILED" in capsys.readouterr().out


@pytest.mark.usefixtures("daemon")
def test_list_cuts_nothing_and_reads_no_markup(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name, host = "db-52-" + "d" * 50, "[fd00::1]:7601"
    script.migrations = {name: migrations_pb2.Migration(migration_id=name, vm="[/]", destination=host)}
    assert main(["list"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert name in out
    assert host in out
    assert "[/]" in out


@pytest.mark.usefixtures("daemon")
def test_list_shows_the_newest_of_the_past(script, capsys):
    script.migrations = {
        f"m{n:03}": migrations_pb2.Migration(
            migration_id=f"m{n:03}", phase=migrations_pb2.PHASE_COMPLETED, end_time=at(1000 - n)
        )
        for n in range(50)
    }
    assert main(["list", "-o", "name"]) == ExitCode.OK
    assert capsys.readouterr().out.split() == [f"m{n:03}" for n in range(20)]
    assert len(script.asked) < 15, "the pages of older ones are not read"
    assert main(["list", "--all", "-o", "name"]) == ExitCode.OK
    assert len(capsys.readouterr().out.split()) == 50


@pytest.mark.usefixtures("daemon")
def test_problems_is_exit_1_if_there_is_one(script, capsys):
    assert main(["problems"]) == ExitCode.OK
    assert capsys.readouterr().out == "nothing is wrong\n"
    script.problems = [
        problems_pb2.Problem(
            weight=problems_pb2.PROBLEM_WEIGHT_HURT,
            reason_code="PAGER_FAILED",
            host="host-a",
            effect="web-1 is frozen or slow: 2 vCPUs wait",
            cause="killed by SIGKILL",
            start_time=at(time.time() - 7200),
            command="vmferry show m1",
        )
    ]
    assert main(["problems"]) == ExitCode.REFUSED
    out = capsys.readouterr().out
    assert out.startswith("HURT  web-1 is frozen or slow: 2 vCPUs wait  (for 2h00m)")
    assert "cause  host-a: killed by SIGKILL  [PAGER_FAILED]" in out
    assert main(["top"]) == ExitCode.OK
    assert "0 under way, 1 problems" in capsys.readouterr().out


@pytest.mark.usefixtures("daemon")
def test_events_of_both_hosts(script, capsys):
    script.migrations = {"m1": paused()}
    assert main(["events", "m1"]) == ExitCode.OK
    assert capsys.readouterr().out == "00:00:00.000Z  host-a  pager_ended  killed\n"


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize(("wanted", "said"), [("postcopy", "POSTCOPY"), ("completed", "COMPLETED"), ("ended", "COMP")])
def test_wait_ends_with_the_phase(script, capsys, wanted, said):
    script.revisions = COURSE
    assert main(["wait", "m1", "--for", wanted]) == ExitCode.OK
    assert capsys.readouterr().out.startswith(f"m1: {said}")


@pytest.mark.usefixtures("daemon")
def test_wait_for_a_phase_that_does_not_come_is_exit_1(script):
    script.revisions = [COURSE[0], revision(2, migrations_pb2.PHASE_FAILED)]
    assert main(["wait", "m1", "--for", "postcopy"]) == ExitCode.REFUSED


@pytest.mark.usefixtures("daemon")
def test_wait_gives_up(script):
    script.revisions = COURSE[:1]
    assert main(["wait", "m1", "--within", "0.3"]) == ExitCode.TIMED_OUT


@pytest.mark.usefixtures("daemon")
def test_an_incoming_migration_is_watched_on_its_destination(script, capsys):
    done = paused()
    done.phase = migrations_pb2.PHASE_COMPLETED
    script.migrations, script.arrivals = {"m1": paused()}, [paused(), done]
    assert main(["watch", "m1"]) == ExitCode.OK
    assert "web-1: POSTCOPY_PAUSED" in capsys.readouterr().out


@pytest.mark.usefixtures("daemon")
def test_delete_and_dry_run(script, capsys):
    assert main(["delete", "m1"]) == ExitCode.OK
    assert main(["migrate", "web-1", "--to", "away", "--dry-run"]) == ExitCode.OK
    deleted, checked = script.asked
    assert (deleted.migration_id, checked.validate_only, checked.destination) == ("m1", True, "away:7601")
    assert "Nothing was started" in capsys.readouterr().out


@pytest.mark.usefixtures("daemon")
@pytest.mark.parametrize(
    ("to", "address"),
    [("away", "away:7601"), ("away:9", "away:9"), ("10.0.0.1", "10.0.0.1:7601"), ("fd00::1", "[fd00::1]:7601")],
)
def test_a_host_without_a_port_gets_that_of_peers(script, to, address):
    assert main(["migrate", "web-1", "--to", to, "--id", "m1"]) == ExitCode.OK
    assert script.asked[0].destination == address


def test_version_and_suggestions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("vmferry ")
    with pytest.raises(SystemExit):
        main(["migrat", "web-1"])
    assert "did you mean 'migrate'?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_read_by_its_shell(shell, capsys):
    assert main(["completion", shell]) == ExitCode.OK
    lines = capsys.readouterr().out
    for word in (*VERBS, "push-limit"):
        assert word in lines
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=lines, text=True, check=True)


def test_completion_of_bash_offers_verbs_and_options(capsys):
    main(["completion", "bash"])
    lines = capsys.readouterr().out
    ask = 'COMP_WORDS=(vmferry {}); COMP_CWORD={}; _vmferry; echo "${{COMPREPLY[@]}}"'
    for words, number, wanted in (("mig", 1, "migrate"), ("migrate --dr", 2, "--dry-run")):
        shell = subprocess.run(
            ["bash", "-c", lines + "\n" + ask.format(words, number)], capture_output=True, text=True, check=True
        )
        assert shell.stdout.split() == [wanted]


def test_an_output_that_cannot_be_written(daemon):
    env = os.environ | {"VMFERRY_API": daemon}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, "machines"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            check=False,
        )
    assert (ended.returncode, "No space left" in ended.stderr, "Traceback" in ended.stderr) == (1, True, False)


def test_a_reader_that_has_gone_is_exit_141(daemon):
    env = os.environ | {"VMFERRY_API": daemon}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, "machines"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (ExitCode.BROKEN_PIPE, "")
