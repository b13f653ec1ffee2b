"""Each verb against a scripted daemon: what it asks, prints and returns."""

from __future__ import annotations

import json
import re
import socket

import pytest

from tests.support.scripted.cli import COURSE, revision
from vmferry.cli import main
from vmferry.cli.exit_codes import ExitCode
from vmferry.cli.verbs import demo
from vmferry.cli.verbs.migrate import new_id
from vmferry.v1 import common_pb2, migrations_pb2


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_migrate_starts_a_job_and_names_it(daemon, script, capsys):
    assert main(["migrate", "web-1", "--to", "away:7601", "--id", "m1"]) == ExitCode.OK
    assert capsys.readouterr().out == "m1: QUEUED\n"
    assert (script.asked[0].migration_id, script.asked[0].vm, script.asked[0].destination) == (
        "m1",
        "web-1",
        "away:7601",
    )


def test_migrate_and_watch_follows_to_the_end(daemon, script, capsys):
    script.revisions = COURSE
    assert main(["migrate", "web-1", "--to", "away:7601", "--id", "m1", "--watch", "--json"]) == ExitCode.OK
    assert [event["phase"] for event in lines(capsys.readouterr().out)] == ["QUEUED", "POSTCOPY", "COMPLETED"]


@pytest.mark.parametrize(
    ("configured", "options", "asked"),
    [
        (0, [], [0]),
        (0, ["--push-limit", "200MiB/s"], [200 * 1024**2]),
        (0, ["--push-limit", "none"], [0]),
        (7000, ["--push-limit", "none"], [0, 0]),
        (7000, [], [0]),
    ],
)
@pytest.mark.usefixtures("daemon")
def test_migrate_asks_for_its_push_limit(script, capsys, configured, options, asked):
    script.configured_limit = configured
    assert main(["--json", "migrate", "web-1", "--to", "away:7601", "--id", "m1", *options]) == ExitCode.OK
    assert [request.push_bytes_per_s for request in script.asked] == asked
    (event,) = lines(capsys.readouterr().out)
    assert event["push_bytes_per_s"] == (0 if len(asked) > 1 else asked[0] or configured)


def test_push_limit_is_changed_and_told_in_words(daemon, script, capsys):
    assert main(["push-limit", "m1", "1.5Gbit/s"]) == ExitCode.OK
    assert main(["push-limit", "m1", "none"]) == ExitCode.OK
    assert [(request.migration_id, request.push_bytes_per_s) for request in script.asked] == [
        ("m1", 187_500_000),
        ("m1", 0),
    ]
    assert capsys.readouterr().out == "m1: POSTCOPY, push limit 178.8 MiB/s\nm1: POSTCOPY, push limit none\n"


def test_push_limit_of_a_job_that_has_ended(daemon, capsys):
    assert main(["--json", "push-limit", "ended", "0"]) == ExitCode.REFUSED
    (event,) = lines(capsys.readouterr().out)
    assert event["error"]["reason"] == "MIGRATION_ENDED"
    assert "vmferry show" in event["error"]["remedy"]


def test_show_and_watch_tell_the_push_limit(daemon, script, capsys):
    limited = revision(2, migrations_pb2.PHASE_POSTCOPY, progress=COURSE[1].progress, push_bytes_per_s=5 * 1024**2)
    script.migrations = {"m1": limited}
    assert main(["show", "m1"]) == ExitCode.OK
    assert "limit 5.0 MiB/s" in capsys.readouterr().out
    script.migrations, script.revisions = {}, [COURSE[0], limited, COURSE[2]]
    assert main(["watch", "m1"]) == ExitCode.OK
    assert "push limit 5.0 MiB/s" in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["FAILED", "CANCELLED", "LOST"])
def test_a_watched_job_that_does_not_complete_is_exit_1_and_tells_why(daemon, script, capsys, phase):
    end = revision(2, migrations_pb2.Phase.Value(f"PHASE_{phase}"), reason_code="VMM_GONE", reason="The VMM went away.")
    script.revisions = [COURSE[0], end]
    assert main(["watch", "m1"]) == ExitCode.REFUSED
    assert "VMM_GONE: The VMM went away." in capsys.readouterr().out


def test_watch_continues_after_a_restart_of_the_daemon_without_a_gap(daemon, script, capsys):
    script.revisions = COURSE
    script.break_watch_after = 2
    assert main(["watch", "m1", "--json"]) == ExitCode.OK
    assert [event["revision"] for event in lines(capsys.readouterr().out)] == [1, 2, 3]
    assert [request.after_revision for request in script.asked] == [0, 2]


def test_watch_tells_progress_in_plain_lines_where_there_is_no_terminal(daemon, script, capsys):
    script.revisions = COURSE
    assert main(["watch", "m1"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "POSTCOPY, pages 60/100 (60 %)" in out
    assert "poison 3" in out
    assert "m1: COMPLETED after 1.5 s, downtime 12.0 ms" in out


def test_a_refused_call_prints_reason_and_remedy_and_no_traceback(daemon, capsys):
    assert main(["migrate", "nobody", "--to", "away:7601"]) == ExitCode.REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "vmferry: No VM nobody here. (VM_UNKNOWN)\n  Ask another host.\n"


def test_a_refused_call_is_an_event_in_json(daemon, capsys):
    assert main(["--json", "cancel", "m1"]) == ExitCode.REFUSED
    (event,) = lines(capsys.readouterr().out)
    assert event["error"]["reason"] == "PAST_NO_RETURN"
    assert event["error"]["remedy"], "the client has words of its own where the daemon gives none"


def test_an_unreachable_daemon_is_exit_3(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can answer there
        assert main(["--api", f"127.0.0.1:{taken.getsockname()[1]}", "list"]) == ExitCode.UNREACHABLE
    err = capsys.readouterr().err
    assert "UNREACHABLE" in err
    assert "--api" in err


def test_a_daemon_that_does_not_answer_is_exit_4(daemon, script, capsys):
    script.hang = True
    assert main(["machines", "--timeout", "0.3"]) == ExitCode.TIMED_OUT
    assert "--timeout" in capsys.readouterr().err


def test_list_reads_every_page_and_passes_the_filter_on(daemon, script, capsys):
    script.migrations = {f"m{n}": migrations_pb2.Migration(migration_id=f"m{n}", vm="web-1") for n in range(5)}
    assert main(["list", "--filter", "active = true"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert [f"m{n}" in out for n in range(5)] == [True] * 5
    assert {request.filter for request in script.asked} == {"active = true"}


def test_list_says_that_there_is_nothing(daemon, capsys):
    assert main(["list"]) == ExitCode.OK
    assert capsys.readouterr().out == "no migrations\n"


def test_errors_lists_the_ledger(daemon, script, capsys):
    script.errors = [
        common_pb2.MemoryError(
            gpa=0x1234000,
            lsb=12,
            origin=common_pb2.ERROR_ORIGIN_READ,
            severity=common_pb2.SEVERITY_ACTION_REQUIRED,
            guest_visible=True,
            hop=1,
            count=2,
        )
    ]
    assert main(["errors", "web-1"]) == ExitCode.OK
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "0x" in line]
    assert re.split(r"\s{2,}", row.strip())[:5] == ["0x1234000", "4096", "read", "action required", "yes"]


def test_errors_watch_streams_and_ends_with_the_reason(daemon, script, capsys):
    script.errors = [common_pb2.MemoryError(gpa=0x5000)]
    assert main(["errors", "web-1", "--watch", "--json"]) == ExitCode.REFUSED
    change, end = lines(capsys.readouterr().out)
    assert (change["vm"], change["error"]["gpa"]) == ("web-1", "0x5000")
    assert end["error"]["reason"] == "STORE_FAILED"


def test_report_error_takes_hexadecimal(daemon, script, capsys):
    assert main(["report-error", "web-1", "--gpa", "0x1234000"]) == ExitCode.OK
    assert main(["report-error", "web-1", "--gpa", "0x1234567"]) == ExitCode.OK
    assert [request.gpa for request in script.asked] == [0x1234000, 0x1234000], "any byte of the page"
    assert "0x1234000" in capsys.readouterr().out


def test_machines_tells_state_in_words(daemon, capsys):
    assert main(["machines", "--json"]) == ExitCode.OK
    (machine,) = lines(capsys.readouterr().out)
    assert (machine["vm"], machine["state"], machine["progress"]) == ("web-1", "RUNNING", None)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-verb"],
        ["migrate", "web-1"],
        ["migrate", "web-1", "--to", "no port"],
        ["migrate", "web-1", "--to", "host:70000"],
        ["report-error", "web-1", "--gpa", "12x"],
        ["report-error", "web-1", "--gpa", "-1"],
        ["report-error", "web-1", "--gpa", "0x1000", "--lsb", "-5"],
        ["report-error", "web-1", "--gpa", "0x1000", "--lsb", "4294967296"],
        ["show", "m\udcff"],
        ["list", "--timeout", "1e12"],
        ["list", "--timeout", "0"],
        ["migrate", "web-1", "--to", "h:1", "--push-limit", "200"],
        ["push-limit", "m1"],
        ["push-limit", "m1", "fast"],
        ["demo", "--poison", "1,2,3"],
        ["demo", "--memory", "1M"],
        ["demo", "--vcpus", "17"],
    ],
)
def test_wrong_usage_is_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == ExitCode.USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_environment_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setenv("VMFERRY_API", "non sense")
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    assert ended.value.code == ExitCode.USAGE
    assert "VMFERRY_API" in capsys.readouterr().err


def _raises(error):
    async def run(args, output):
        raise error

    return run


def test_ctrl_c_is_exit_130_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", _raises(KeyboardInterrupt()))
    assert main(["demo"]) == ExitCode.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_is_one_line_and_exit_70(monkeypatch, capsys):
    monkeypatch.delenv("VMFERRY_DEBUG", raising=False)
    monkeypatch.setattr(demo, "run", _raises(ZeroDivisionError("oops")))
    assert main(["demo"]) == ExitCode.INTERNAL
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("vm", "start"), [("web-1", "web-1-"), ("Web_1.example", "web-1-example-"), ("9lives", "vm-9lives-"), ("é", "vm-")]
)
def test_a_new_id_has_the_form_that_the_api_asks_for(vm, start):
    made = new_id(vm)
    assert made.startswith(start)
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", made)
    assert made != new_id(vm)
