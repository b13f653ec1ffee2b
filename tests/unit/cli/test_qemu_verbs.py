"""`adopt` and `qemu` against a scripted daemon."""

from __future__ import annotations

import json

import pytest

from tests.support.scripted.cli import Script, scripted_daemon
from vmferry.cli import main
from vmferry.cli.exit_codes import ExitCode
from vmferry.v1 import qemus_pb2 as pb

PROFILE = pb.QemuProfile(version=[7, 2, 22], machine_type="pc-i440fx-7.2", kvm=True, vcpus=2)
WARNED = pb.QemuFinding(weight=pb.QEMU_FINDING_WEIGHT_WARNING, fact="No machine checks", remedy="Leave mce.")
REFUSED = pb.QemuFinding(weight=pb.QEMU_FINDING_WEIGHT_REFUSED, fact="Device vfio-pci pins memory", remedy="Unplug.")


@pytest.fixture
def script():
    command = ["qemu", "-name", "web 1", "-machine", "pc"]
    return Script(qemu=pb.CheckQemuResponse(profile=PROFILE, command=command))


@pytest.fixture
def daemon(script, monkeypatch):
    with scripted_daemon(script) as address:
        monkeypatch.setenv("VMFERRY_API", address)
        yield address


def test_adopt_names_the_monitor_by_its_absolute_path(daemon, script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["adopt", "--qmp", "web.qmp", "--vm", "web-7"]) == ExitCode.OK
    assert capsys.readouterr().out == "web-7: adopted, running (pid 42)\n"
    assert (script.asked[0].monitor, script.asked[0].vm) == (str(tmp_path / "web.qmp"), "web-7")


def test_a_check_without_findings_is_exit_0(daemon, capsys):
    assert main(["adopt", "--check", "web-1"]) == ExitCode.OK
    assert "nothing speaks against a move" in capsys.readouterr().out


@pytest.mark.parametrize(("finding", "code"), [(WARNED, ExitCode.OK), (REFUSED, ExitCode.REFUSED)])
def test_a_check_prints_its_findings(daemon, script, capsys, finding, code):
    script.qemu.findings.append(finding)
    assert main(["adopt", "--check", "web-1"]) == code
    out = capsys.readouterr().out
    assert finding.fact in out and finding.remedy in out


def test_a_check_of_both_hosts_shows_the_source_the_waiting_qemu(daemon, script, capsys):
    """The scripted daemon is both hosts: each has the finding."""
    script.qemu.findings.append(WARNED)
    assert main(["--json", "adopt", "--check", "web-1", "--to", daemon]) == ExitCode.OK
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 2
    waiting, source = script.asked
    assert not waiting.HasField("destination")
    assert source.destination == PROFILE


@pytest.mark.parametrize("words", [["adopt"], ["adopt", "--qmp", "/x", "--check", "web-1"], ["qemu", "--vm", "web-1"]])
def test_a_verb_without_its_action_is_a_usage_error(words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_the_command_of_the_destination_can_be_pasted_into_a_shell(daemon, capsys):
    assert main(["qemu", "destination-command", "--vm", "web-1"]) == ExitCode.OK
    assert capsys.readouterr().out == "qemu -name 'web 1' -machine pc-i440fx-7.2 -S -incoming defer\n"


def test_the_waiting_domain_of_libvirt_is_printed(daemon, capsys, tmp_path):
    domain = tmp_path / "web-1.xml"
    domain.write_text(
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><os><type machine='pc'>hvm</type></os>"
        "<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:/run/a'/></qemu:commandline></domain>"
    )
    assert main(["qemu", "destination-command", "--vm", "web-1", "--libvirt", str(domain)]) == ExitCode.OK
    out = capsys.readouterr().out
    assert 'machine="pc-i440fx-7.2"' in out and 'value="defer"' in out
    domain.write_text("nothing")
    assert main(["qemu", "destination-command", "--vm", "web-1", "--libvirt", str(domain)]) != ExitCode.OK
    assert "virsh dumpxml" in capsys.readouterr().err
