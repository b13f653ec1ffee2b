"""A program of the host starts the QEMU of a VM that comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.testing.script import Script
from vmferry.testing.vmm import FakeVmm, FakeVmms, identity
from vmferry.vmm.qemu.template import QemuTemplate

PLATFORM = "x86_64/qemu-kvm/pc-i440fx-7.2"


def program(directory: Path, body: str) -> Path:
    path = directory / "start-qemu"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def here(vm: str = "web") -> FakeVmms:
    vmms = FakeVmms()
    vmms.add(FakeVmm(identity(vm, "incoming", 300, PLATFORM), Script("b")))
    return vmms


async def test_the_program_is_told_the_vm_and_its_platform(tmp_path: Path) -> None:
    said = tmp_path / "said"
    await QemuTemplate(program(tmp_path, f'echo "$@" > {said}'), here(), 5.0).start("web", PLATFORM)
    assert said.read_text() == f"web {PLATFORM}\n"


async def test_a_qemu_that_keeps_the_output_open_holds_nothing_up(tmp_path: Path) -> None:
    await QemuTemplate(program(tmp_path, "sleep 30 &"), here(), 5.0).start("web", PLATFORM)


async def test_a_host_without_a_template_starts_nothing() -> None:
    await QemuTemplate(None, FakeVmms(), 5.0).start("web", PLATFORM)


@pytest.mark.parametrize(
    ("body", "within_s", "words"),
    [
        ("echo no such disk >&2; exit 3", 5.0, "ended with 3: no such disk"),
        ("exit 3", 5.0, "no reason given"),
        ("sleep 30", 0.2, "did not end within 0.2 s"),
        ("true", 0.2, "no QEMU of web was adopted"),
    ],
)
async def test_a_failure_is_told_with_its_words(tmp_path: Path, body: str, within_s: float, words: str) -> None:
    with pytest.raises(VmferryError) as caught:
        await QemuTemplate(program(tmp_path, body), here("other"), within_s).start("web", PLATFORM)
    assert caught.value.reason is Reason.DESTINATION_NO_VMM
    assert words in caught.value.message


async def test_a_program_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(VmferryError, match="cannot be run"):
        await QemuTemplate(tmp_path / "nothing", here(), 5.0).start("web", PLATFORM)


@pytest.mark.parametrize("platform", ["", "x86_64/qemu-kvm/pc,firmware=/etc/shadow", "a b", "$(id)", "x" * 101])
async def test_a_platform_that_could_be_more_than_a_name_is_refused(tmp_path: Path, platform: str) -> None:
    said = tmp_path / "said"
    with pytest.raises(VmferryError, match="platform"):
        await QemuTemplate(program(tmp_path, f"touch {said}"), here(), 5.0).start("web", platform)
    assert not said.exists()
