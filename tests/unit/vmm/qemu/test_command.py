"""The command line of a waiting QEMU."""

from __future__ import annotations

import pytest

from vmferry.vmm.qemu.command import destination_command

TYPE = "pc-i440fx-7.2"


@pytest.mark.parametrize(
    ("source", "waits"),
    [
        (["qemu", "-m", "64"], ["qemu", "-m", "64", "-machine", TYPE]),
        (["qemu", "-machine", "pc"], ["qemu", "-machine", TYPE]),
        (["qemu", "-M", "pc,accel=kvm"], ["qemu", "-M", f"{TYPE},accel=kvm"]),
        (["qemu", "--machine", "accel=kvm,type=pc"], ["qemu", "--machine", f"{TYPE},accel=kvm"]),
        (["qemu", "-machine", "accel=kvm"], ["qemu", "-machine", f"{TYPE},accel=kvm"]),
        (["qemu", "-S", "-m", "64", "-machine", "pc"], ["qemu", "-m", "64", "-machine", TYPE]),
        (["qemu", "-incoming", "tcp:0:4444", "-machine", "pc"], ["qemu", "-machine", TYPE]),
        (["qemu", "-loadvm", "x", "-machine", "pc"], ["qemu", "-machine", TYPE]),
    ],
)
def test_it_waits_with_the_machine_type_in_full(source: list[str], waits: list[str]) -> None:
    assert destination_command(source, TYPE) == [*waits, "-S", "-incoming", "defer"]


def test_the_command_of_a_waiting_qemu_stays() -> None:
    once = destination_command(["qemu", "-machine", "pc", "-name", "web-1"], TYPE)
    assert destination_command(once, TYPE) == once
