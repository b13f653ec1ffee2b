"""Which state of the VMM protocol a QEMU is in, by its run state and by what vmferry left in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.vmm.qemu.mark import Mark, parse_mark, vm_state


@given(st.sampled_from(["stopped", "prepared", "loading", "running"]), st.none() | st.integers(0, 2**31 - 1))
def test_a_mark_is_read_as_it_was_written(stage: str, uffd: int | None) -> None:
    assert parse_mark(Mark(stage, uffd).text) == Mark(stage, uffd)


@pytest.mark.parametrize(
    "text", ["", "vmferry", "vmferry:", "vmferry:gone", "vmferry:prepared:uffd=", "libvirt", "rdonly:/x"]
)
def test_another_ones_descriptor_set_is_no_mark(text: str) -> None:
    assert parse_mark(text) is None


@pytest.mark.parametrize(
    ("status", "mark", "state"),
    [
        ("running", None, "running"),
        ("running", Mark("stopped"), "running"),
        ("running", Mark("loading", 7), "running"),
        ("running", Mark("running", 7), "running"),
        ("paused", Mark("stopped"), "stopped"),
        ("postmigrate", Mark("stopped"), "stopped"),
        ("inmigrate", None, "incoming"),
        ("inmigrate", Mark("prepared", 7), "prepared"),
        ("inmigrate", Mark("loading", 7), "loaded"),
        ("paused", Mark("loading", 7), "loaded"),
    ],
)
def test_states_that_vmferry_knows(status: str, mark: Mark | None, state: str) -> None:
    assert vm_state(status, mark) == state


@pytest.mark.parametrize(
    ("status", "mark"),
    [
        ("paused", None),
        ("postmigrate", None),
        ("paused", Mark("running", 7)),
        ("prelaunch", None),
        ("shutdown", Mark("stopped")),
        ("io-error", Mark("stopped")),
        ("guest-panicked", None),
        ("internal-error", Mark("loading")),
        ("suspended", None),
        ("", None),
    ],
)
def test_a_vm_that_somebody_else_stopped_is_left_alone(status: str, mark: Mark | None) -> None:
    assert vm_state(status, mark) is None
