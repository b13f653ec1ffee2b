"""The demo's parts that can be tried without a migration."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.daemon import config
from vmferry.demo import options, patience
from vmferry.demo.admin import Admin, AdminError
from vmferry.demo.network import NamespacePair, loopback_places
from vmferry.demo.patience import patient
from vmferry.demo.processes import Process, end_processes_of, processes_of, to_the_end
from vmferry.demo.stage import Host, StageError, guest_arguments, until, waiting_arguments
from vmferry.errors import VmferryError
from vmferry.units import MIB


@pytest.mark.parametrize(("text", "size"), [("512M", 512 * MIB), ("1G", 1024 * MIB), ("65536K", 64 * MIB)])
def test_sizes(text, size):
    assert options.memory_size(text) == size


@pytest.mark.parametrize("text", ["", "512", "1T", "-512M", "33555M3"])
def test_wrong_sizes(text):
    with pytest.raises(argparse.ArgumentTypeError):
        options.memory_size(text)


def parsed(*words: str) -> options.DemoOptions:
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return options.from_arguments(parser.parse_args(words))


def test_the_guests_memory_is_as_asked_on_either_host():
    plain = parsed()
    assert (plain.shape, plain.waiting) == (options.GuestShape(), options.WaitingShape())
    assert waiting_arguments(plain.waiting) == ["--incoming"]
    asked = parsed(
        *("--backing", "memfd", "--page-size", "2M"),
        *("--destination-backing", "anonymous", "--destination-page-size", "4K"),
    )
    words = guest_arguments(asked.shape)
    assert words[words.index("--page-size") + 1] == str(2 * MIB)
    assert words[words.index("--backing") + 1] == "memfd"
    assert waiting_arguments(asked.waiting) == ["--incoming", "--backing", "anonymous", "--page-size", "4096"]
    with pytest.raises(SystemExit):
        parsed("--page-size", "8K")


def test_a_qemu_is_not_asked_for_more_than_it_has():
    asked = parsed("--qemu")
    assert (asked.qemu, asked.poison_before, asked.poison_during) == ("", 64, 0)
    assert (parsed().qemu, parsed().poison_during) == (None, 16)
    assert parsed("--qemu", "/usr/bin/qemu", "--poison", "8").qemu == "/usr/bin/qemu"
    wrong = (("--poison", "8,4"), ("--accel", "process"), ("--page-size", "2M"), ("--destination-page-size", "1G"))
    for words in (*wrong, ("--real-frames",)):
        with pytest.raises(VmferryError, match="--qemu"):
            parsed("--qemu", *words)


def test_poison_counts():
    assert options.poison_counts("64,16") == (64, 16)
    assert options.poison_counts("8") == (8, 0)


@pytest.mark.parametrize("there", [False, True], ids=["no device", "a file that is no KVM"])
def test_without_kvm_the_process_is_used_and_told(tmp_path, there):
    device = tmp_path / "kvm"
    if there:
        device.touch()
    assert options.choose_accel("process", device) == ("process", "")
    for asked in ("auto", "kvm"):
        accel, words = options.choose_accel(asked, device)
        assert accel == "process"
        assert str(device) in words


def test_places_on_loopback_do_not_overlap():
    ports = [
        port
        for place in loopback_places(3)
        for port in (place.api_port, place.peer_port, place.ops_port, *range(*place.page_ports))
    ]
    assert len(set(ports)) == len(ports)


async def test_a_wait_is_bounded_and_names_its_condition():
    async def never():
        return False

    with pytest.raises(StageError, match="for the moon"):
        await until("the moon", never, 0.05)


async def test_a_shielded_step_is_finished_when_cancelled_twice():
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.1)
        done.set()

    task = asyncio.create_task(to_the_end(work()))
    for _ in range(2):
        await asyncio.sleep(0.02)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()


async def test_processes_are_found_by_the_stage_directory_and_ended(tmp_path):
    root = tmp_path / "stage"
    root.mkdir()
    other = tmp_path / "stage-other"
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    stubborn = await Process.start("stubborn", [sys.executable, "-c", code, f"{root}/x"], root / "log")
    bystander = await Process.start("bystander", ["sleep", "60"], root / "log2", environment={"X": f"{other}/"})
    try:
        assert processes_of(root) == [stubborn.pid]
        await asyncio.sleep(0.2)
        assert await end_processes_of(root, grace_s=0.3) == []
        assert await stubborn.ended(patient(5))
        assert bystander.alive
    finally:
        await bystander.stop()
        await stubborn.kill()


def test_a_configuration_is_one_that_the_daemon_takes(tmp_path, monkeypatch):
    (tmp_path / "vmferry-pager").write_text("#!/bin/sh\n")
    (tmp_path / "vmferry-pager").chmod(0o755)
    monkeypatch.setenv("VMFERRY_PROGRAMS", str(tmp_path))
    host = Host("a", loopback_places(1)[0], tmp_path)
    loaded = config.load(host.write_config(pages="demand_timeout_s = 1.5"), "unnamed")
    assert str(loaded.api) == host.place.api
    assert loaded.pages.ports == host.place.page_ports
    assert loaded.vmm_socket == host.vmm_socket


@pytest.mark.parametrize(("factor", "expected_s"), [(1, (1.5, 10, 60)), (7, (10.5, 70, 420)), (30, (45, 300, 600))])
def test_patience_multiplies_the_time_outs_of_a_daemon(tmp_path, monkeypatch, factor, expected_s):
    (tmp_path / "vmferry-pager").touch(mode=0o755)
    monkeypatch.setenv("VMFERRY_PROGRAMS", str(tmp_path))
    monkeypatch.setattr(patience, "FACTOR", factor)
    host = Host("a", loopback_places(1)[0], tmp_path)
    loaded = config.load(host.write_config(pages="demand_timeout_s = 1.5"), "unnamed")
    assert (loaded.pages.demand_timeout_s, loaded.timeouts.vmm_s, loaded.timeouts.stop_s) == expected_s


def test_a_daemon_of_the_demo_has_the_time_outs_of_any(tmp_path, monkeypatch):
    (tmp_path / "vmferry-pager").touch(mode=0o755)
    monkeypatch.setenv("VMFERRY_PROGRAMS", str(tmp_path))
    monkeypatch.setattr(patience, "FACTOR", 1)
    loaded = config.load(Host("a", loopback_places(1)[0], tmp_path).write_config(), "unnamed")
    plain = config.parse({}, "unnamed")
    assert loaded.timeouts == plain.timeouts
    assert loaded.pages.demand_timeout_s == plain.pages.demand_timeout_s


@pytest.mark.parametrize("text", ["", "1", None])
def test_without_a_word_patience_is_one(text):
    assert patience.patience(text) == 1


@pytest.mark.parametrize("text", ["0", "-1", "long", "nan", "inf"])
def test_patience_that_is_no_positive_number_is_refused(text):
    with pytest.raises(VmferryError, match="VMFERRY_PATIENCE: '"):
        patience.patience(text)


async def _admin_server(path: Path, answers: list[bytes]) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readline()
            writer.write(answer)
        await writer.drain()
        writer.close()

    return await asyncio.start_unix_server(serve, str(path))


async def test_injections_go_out_together_and_refusals_come_back_by_page(tmp_path):
    answers = [{"ok": True}, {"ok": False, "error": "not RAM"}]
    async with await _admin_server(tmp_path / "a", [json.dumps(a).encode() + b"\n" for a in answers]):
        admin = Admin(tmp_path / "a")
        assert await admin.inject([(0x1000, True), (0x2000, False)]) == ["", "not RAM"]
        with pytest.raises(AdminError, match=r"closed by the VMM|Connection lost"):
            await admin.report()
        await admin.close()


@pytest.mark.parametrize("real", [False, True])
async def test_frames_of_the_host_go_bad_only_where_asked(tmp_path, real):
    asked = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(json.loads(await reader.readline()))
        writer.write(b'{"ok": true}\n')

    words = ["--real-frames"] if real else []
    async with await asyncio.start_unix_server(serve, str(tmp_path / "a")):
        admin = Admin(tmp_path / "a")
        await admin.inject([(0x1000, True)], parsed(*words).real_frames)
        await admin.close()
    assert asked == [{"cmd": "inject", "gpa": 0x1000, "tell": True, "real_frame": real}]


async def test_a_vmm_that_is_gone_is_an_admin_error(tmp_path):
    with pytest.raises(AdminError, match="No such file"):
        await Admin(tmp_path / "none").report()


NAMESPACES = """
import asyncio, socket
from vmferry.demo.network import NamespacePair
from vmferry.demo.processes import Process
from pathlib import Path
import sys

async def main():
    pair = NamespacePair()
    why = await pair.make()
    if why:
        print("skip", why); return
    try:
        home, away = pair.places()
        log = Path(sys.argv[1]) / "log"
        argv = [sys.executable, "-u", "-m", "http.server", "7600", "--bind", away.ip]
        server = await Process.start("http", argv, log, away.netns)
        pair.enter()
        for _ in range(200):
            try:
                _, writer = await asyncio.open_connection(away.ip, 7600)
                writer.close()
                print("reached")
                break
            except OSError:
                await asyncio.sleep(0.05)
        await server.stop()
    finally:
        await pair.remove()
    print(any(Path("/run/netns/" + name).exists() for name in pair.names))

asyncio.run(main())
"""


def test_two_namespaces_reach_each_other_and_nothing_is_left(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NAMESPACES, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    if done.stdout.startswith("skip"):
        pytest.skip(f"no network namespaces here: {done.stdout}")
    assert done.stdout.split() == ["reached", "False"], done.stderr


async def test_namespaces_that_cannot_be_made_leave_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "ip netns add" in await NamespacePair().make()
