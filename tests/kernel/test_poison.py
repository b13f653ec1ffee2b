"""`UFFDIO_POISON`, and the operations that undo it: the table of docs/reference/kernel-facts.md, a test a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("uffd_poison")

PAGE = 4096
HUGE_PAGE = 2 << 20
SOFT_DIRTY = 1 << 55
"""Of a pagemap entry: set in a new mapping where the kernel has CONFIG_MEM_SOFT_DIRTY (admin-guide/mm/pagemap.rst)."""
both = pytest.mark.parametrize("backing", ["anon", "shmem"])


def entry_of(answers: dict[str, str]) -> int:
    return int(answers["entry"], 16) & ~SOFT_DIRTY


@both
def test_absent_page_gets_a_marker_and_a_touch_raises_sigbus_without_an_event(ask: Any, backing: str) -> None:
    answers = ask("poison", "absent", backing)
    assert (answers["poison"], answers["updated"]) == ("0", str(PAGE))
    assert (answers["touch"], answers["event"]) == ("sigbus", "0")


def test_page_in_the_page_cache_gets_a_marker(ask: Any) -> None:
    assert ask("poison", "in-page-cache", "shmem") == {"poison": "0", "touch": "sigbus", "event": "0"}


@both
def test_present_page_is_eexist_and_unchanged(ask: Any, backing: str) -> None:
    assert ask("poison", "present", backing) == {"poison": "EEXIST", "updated": "-17", "touch": "byte:7"}


@both
def test_second_marker_is_eexist(ask: Any, backing: str) -> None:
    assert ask("poison", "twice", backing) == {"poison": "EEXIST", "updated": "-17", "touch": "sigbus"}


@both
def test_range_stops_at_a_present_page_with_eagain_and_the_bytes_done(ask: Any, backing: str) -> None:
    answers = ask("poison", "range-partly-present", backing)
    assert (answers["poison"], answers["updated"], answers["again"]) == ("EAGAIN", str(2 * PAGE), "0")
    assert [answers[f"page{n}"] for n in range(4)] == ["sigbus", "sigbus", "byte:7", "sigbus"]


@both
def test_beyond_the_mapping_is_enoent_and_unaligned_is_einval(ask: Any, backing: str) -> None:
    assert ask("poison", "outside", backing) == {"beyond": "ENOENT", "unaligned": "EINVAL", "short": "EINVAL"}


def test_huge_page_is_poisoned_whole_or_not_at_all(ask: Any, huge_pages: None) -> None:
    assert ask("poison", "part-of-huge-page", "hugetlb") == {"part": "EINVAL", "whole": "0"}


def test_huge_page_marker_raises_sigbus(ask: Any, huge_pages: None) -> None:
    answers = ask("poison", "absent", "hugetlb")
    assert (answers["poison"], answers["updated"]) == ("0", str(HUGE_PAGE))
    assert (answers["touch"], answers["event"]) == ("sigbus", "0")


@both
def test_copy_over_a_marker_silently_unpoisons(ask: Any, backing: str) -> None:
    assert ask("poison", "copy-over", backing) == {"copy": "0", "touch": "byte:7"}


def test_copy_over_a_huge_page_marker_silently_unpoisons(ask: Any, huge_pages: None) -> None:
    assert ask("poison", "copy-over", "hugetlb") == {"copy": "0", "touch": "byte:7"}


@both
def test_range_copy_overwrites_every_marker_in_it(ask: Any, backing: str) -> None:
    answers = ask("poison", "copy-range-over", backing)
    assert answers == {"copy": "0", "copied": str(8 * PAGE), "page1": "byte:7", "page3": "byte:7"}


def test_continue_over_a_marker_silently_unpoisons(ask: Any) -> None:
    assert ask("poison", "continue-over", "shmem") == {"continue": "0", "touch": "byte:7"}


def test_zeropage_over_a_marker_unpoisons_shmem(ask: Any) -> None:
    assert ask("poison", "zeropage-over", "shmem") == {"zeropage": "0", "touch": "byte:0"}


def test_zeropage_over_a_marker_is_refused_on_anonymous_memory(ask: Any) -> None:
    assert ask("poison", "zeropage-over", "anon") == {"zeropage": "EEXIST", "touch": "sigbus"}


@pytest.mark.parametrize(("case", "backing"), [("dontneed", "anon"), ("dontneed", "shmem"), ("free", "anon")])
def test_madvise_drops_the_marker_and_the_next_touch_is_a_missing_fault(ask: Any, case: str, backing: str) -> None:
    answers = ask("poison", f"{case}-registered", backing)
    assert answers == {"madvise": "0", "event": "pagefault", "offset": str(PAGE)}


@both
def test_marker_dropped_in_an_unregistered_range_reads_as_zeros(ask: Any, backing: str) -> None:
    assert ask("poison", "dontneed-unregistered", backing) == {"before": "sigbus", "after": "byte:0"}


def test_marker_belongs_to_one_mapping_and_the_memfd_does_not_know(ask: Any) -> None:
    answers = ask("poison", "other-views", "shmem")
    assert answers["marked"] == "sigbus"
    assert (answers["mapping_data"], answers["mapping_hole"]) == ("byte:7", "byte:0")
    assert (answers["pread_data"], answers["pread_hole"]) == ("7", "0")


@both
def test_system_calls_that_read_a_marker_fail_without_a_signal(ask: Any, backing: str) -> None:
    answers = ask("poison", "reads-by-system-calls", backing)
    assert answers == {
        "process_vm_readv": "EFAULT",
        "write": "EFAULT",
        "proc_mem": "EIO",
        "populate": "EHWPOISON",
    }


@both
@pytest.mark.parametrize("event", ["mremap", "mprotect", "unregister", "close"])
def test_marker_outlives(ask: Any, backing: str, event: str) -> None:
    assert ask("poison", f"after-{event}", backing) == {"touch": "sigbus"}


def test_fork_copies_the_markers_of_anonymous_memory(ask: Any) -> None:
    assert ask("poison", "after-fork", "anon") == {"child": "sigbus", "parent": "sigbus"}


def test_fork_does_not_copy_the_markers_of_shared_memory(ask: Any) -> None:
    assert ask("poison", "after-fork", "shmem") == {"child": "byte:0", "parent": "sigbus"}


@both
def test_signal_of_a_user_space_touch_names_the_touched_address(ask: Any, backing: str) -> None:
    answers = ask("poison", "absent", backing)
    kernel_handles_memory_failure = Path("/proc/sys/vm/memory_failure_recovery").exists()
    wanted = ("BUS_MCEERR_AR", "12") if kernel_handles_memory_failure else ("BUS_ADRERR", "0")
    assert (answers["code"], answers["lsb"]) == wanted
    assert int(answers["offset"]) // PAGE == 1


@both
def test_pagemap_shows_a_marker_as_a_swap_entry_of_its_own(ask: Any, backing: str) -> None:
    assert entry_of(ask("poison", "in-pagemap", backing)) == 0x400000000000005F


@both
def test_pagemap_hides_the_kind_of_a_swap_entry_from_a_reader_without_cap_sys_admin(ask: Any, backing: str) -> None:
    assert entry_of(ask("poison", "in-pagemap-unprivileged", backing)) == 1 << 62


@both
def test_a_scan_of_the_pagemap_tells_a_marker_and_nothing_else(ask: Any, backing: str) -> None:
    assert ask("poison", "in-scan", backing) == {"ranges": "1", "first": "1", "pages": "1"}


def test_pagemap_does_not_show_a_huge_page_marker(ask: Any, huge_pages: None) -> None:
    assert entry_of(ask("poison", "in-pagemap", "hugetlb")) == 0


@both
def test_copy_never_replaces_a_present_page(ask: Any, backing: str) -> None:
    answers = ask("poison", "copy-over-present", backing)
    assert (answers["single"], answers["single_copied"]) == ("EEXIST", "-17")
    assert (answers["range"], answers["range_copied"]) == ("EAGAIN", str(2 * PAGE))
    assert (answers["page1"], answers["page2"]) == ("byte:9", "byte:7")
