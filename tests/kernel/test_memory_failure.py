"""What becomes of frames that went bad, where the kernel has CONFIG_MEMORY_FAILURE. `make test-kernels` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("uffd_poison")

EARLY_KILL = Path("/proc/sys/vm/memory_failure_early_kill")
FEW = 5
"""4 KiB pieces of a huge page before its bad one."""

both = pytest.mark.parametrize("backing", ["anon", "shmem"])
each = pytest.mark.parametrize("backing", ["anon", "shmem", "hugefile"])
real = pytest.mark.usefixtures("real_frames", "huge_pages")


@pytest.fixture(params=["late", "early"])
def host_policy(request: pytest.FixtureRequest, real_frames: None) -> Iterator[str]:
    """`vm.memory_failure_early_kill`, as before afterwards."""
    before = EARLY_KILL.read_text()
    EARLY_KILL.write_text(str(int(request.param == "early")))
    yield request.param
    EARLY_KILL.write_text(before)


@real
@each
def test_madvise_signals_its_caller_and_each_touch_is_sigbus(ask: Any, backing: str) -> None:
    lsb = "21" if backing == "hugefile" else "12"
    wanted = {"caller_signals": "1", "caller_code": "AR", "caller_lsb": lsb}
    wanted |= {"touch": "sigbus", "code": "AR", "lsb": lsb, "offset": "100", "next_page": "byte:3"}
    if backing == "hugefile":
        wanted["same_huge_page"] = "sigbus"
    if backing != "anon":
        wanted |= {"other_mapping": "sigbus", "untouched_mapping": "sigbus"}
    assert ask("memory_failure", "touched", backing) == wanted


@real
@each
def test_system_calls_that_read_a_bad_frame_fail_without_a_signal(ask: Any, backing: str) -> None:
    answers = ask("memory_failure", "system-calls", backing)
    mapped = {name: answers[name] for name in ("process_vm_readv", "write", "send", "proc_mem", "populate")}
    failed = dict.fromkeys(("process_vm_readv", "write", "send"), "EFAULT")
    assert mapped == failed | {"proc_mem": "EIO", "populate": "EHWPOISON"}


@real
def test_the_file_of_a_bad_frame_gives_eio_there_and_says_nowhere_else_that_it_is_bad(ask: Any) -> None:
    answers = ask("memory_failure", "system-calls", "shmem")
    assert {answers[name] for name in ("pread", "pwrite", "sendfile")} == {"EIO"}
    assert (answers["pread_from_before"], answers["mincore"], answers["seek_data"]) == ("4096", "1", "0")


@real
def test_the_file_of_a_huge_page_gives_all_but_the_bad_piece(ask: Any) -> None:
    answers = ask("memory_failure", "pieces-of-a-huge-page", "hugefile")
    assert answers == {"good_pieces": "511", "bad_piece": "EIO", "whole": str(FEW * 4096)}


@real
@both
def test_pagemap_shows_a_swap_entry_with_the_frames_number(ask: Any, backing: str) -> None:
    answers = ask("memory_failure", "in-pagemap", backing)
    assert (answers["swapped"], answers["has_pfn"], answers["marker_type"], answers["kpageflag"]) == (
        "1",
        "1",
        "0",
        "1",
    )
    assert (answers["ranges"], answers["first"], answers["pages"]) == ("1", "1", "1")


@real
def test_pagemap_shows_nothing_of_a_bad_huge_page_but_its_scan_does(ask: Any) -> None:
    answers = ask("memory_failure", "in-pagemap", "hugefile")
    assert answers["swapped"] == "0"
    assert (answers["ranges"], answers["first"], answers["pages"]) == ("1", "512", "512")


@real
@both
def test_uffd_calls_over_a_bad_frame_that_is_mapped_change_nothing(ask: Any, backing: str) -> None:
    answers = ask("memory_failure", "uffd-calls", backing)
    assert {answers[name] for name in ("copy", "poison", "zeropage")} == {"EEXIST"}
    assert answers.get("continue", "EIO") == "EIO"
    assert answers["touch"] == "sigbus"


@real
def test_a_bad_frame_in_the_file_is_a_minor_fault_until_it_is_punched_out(ask: Any) -> None:
    assert ask("memory_failure", "unmapped-in-the-file", "shmem") == {
        "continue": "EIO",
        "minor": "1",
        "continue_then": "EIO",
        "copy": "EEXIST",
        "copy_after_punch": "0",
        "byte": "9",
    }


@real
def test_a_marker_over_a_bad_frame_in_the_file_stays(ask: Any) -> None:
    answers = ask("memory_failure", "marker-over-it", "shmem")
    assert answers == {"poison": "0", "copy": "EEXIST", "continue": "EIO", "touch": "sigbus"}


@real
def test_dontneed_turns_an_anonymous_bad_page_into_zeros(ask: Any) -> None:
    assert ask("memory_failure", "given-back", "anon") == {"after_dontneed": "byte:0"}


@real
@pytest.mark.parametrize("backing", ["shmem", "hugefile"])
def test_a_hole_in_the_file_takes_the_bad_frame_away(ask: Any, backing: str) -> None:
    """But a mapping of 4 KiB pages that had it gives SIGBUS until it drops the page by MADV_DONTNEED."""
    answers = ask("memory_failure", "given-back", backing)
    assert (answers["after_dontneed"], answers["after_punch_hole"], answers["pread"]) == ("sigbus", "byte:0", "0")
    assert answers["other_mapping"] == ("sigbus" if backing == "shmem" else "byte:0")


@real
@both
def test_a_transparent_huge_page_loses_4_kib(ask: Any, backing: str) -> None:
    """The kernel drops the mapping of a huge page of a memfd as a whole, so that the call signals nobody."""
    signals = "1" if backing == "anon" else "0"
    wanted = {"caller_signals": signals, "bad": "sigbus", "good_pages": "511"}
    assert ask("memory_failure", "in-transparent-huge-page", backing) == wanted


@real
@pytest.mark.parametrize("backing", ["anon", "shmem", "hugetlb", "hugefile"])
def test_a_copy_from_a_bad_frame_is_efault_and_installs_nothing(ask: Any, backing: str) -> None:
    answers = ask("memory_failure", "copied-from-it", backing)
    assert answers == {"copy": "EFAULT", "signals": "0", "copy_then": "0", "byte": "byte:6"}


@real
@both
def test_a_receive_into_a_bad_frame_is_efault_and_takes_nothing_from_the_connection(ask: Any, backing: str) -> None:
    answers = ask("memory_failure", "received-into-it", backing)
    assert answers == {"recv": "EFAULT", "recv_then": "8192", "byte": "8"}


@real
@each
def test_a_frame_that_is_in_use_is_bad_though_the_host_cannot_set_it_aside(ask: Any, backing: str) -> None:
    error = "0" if backing == "anon" else "EBUSY"
    assert ask("memory_failure", "in-use", backing) == {"corrupt": error, "touch": "sigbus"}


@real
@each
def test_a_soft_offlined_frame_is_replaced_unseen(ask: Any, backing: str) -> None:
    assert ask("memory_failure", "soft-offlined", backing) == {"touch": "byte:2", "event": "0", "other_frame": "1"}


@each
@pytest.mark.usefixtures("huge_pages")
def test_an_untouched_error_is_told_where_the_host_kills_early(ask: Any, backing: str, host_policy: str) -> None:
    answers = ask("memory_failure", "untouched", backing)
    if host_policy == "late":
        assert answers == {"signals": "0"}
    else:
        lsb = "21" if backing == "hugefile" else "12"
        assert answers == {"signals": "1", "code": "AO", "lsb": lsb, "in_main_thread": "1"}


@both
def test_a_process_that_asks_for_early_errors_gets_them_on_any_host(ask: Any, backing: str, host_policy: str) -> None:
    answers = ask("memory_failure", "untouched-early", backing)
    assert answers == {"signals": "1", "code": "AO", "lsb": "12", "in_main_thread": "1"}


@both
def test_a_process_that_refuses_early_errors_before_its_first_thread_gets_none(
    ask: Any, backing: str, host_policy: str
) -> None:
    assert ask("memory_failure", "untouched-late", backing) == {"signals": "0"}


def test_refusing_early_errors_after_the_first_thread_protects_only_its_caller(ask: Any, host_policy: str) -> None:
    answers = ask("memory_failure", "untouched-late-too-late", "shmem")
    if host_policy == "early":
        assert (answers["signals"], answers["code"], answers["in_main_thread"]) == ("1", "AO", "0")


def test_threads_children_and_programs_inherit_the_policy(ask: Any) -> None:
    assert ask("memory_failure", "policy-goes-on", "anon") == {
        "at_first": "2",
        "thread": "0",
        "child": "0",
        "exec": "0",
    }
