"""The life of a userfaultfd, the fate of unanswered faults, and the contents of events."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("uffd_poison")

PAGE = 4096
both = pytest.mark.parametrize("backing", ["anon", "shmem"])


@both
def test_last_close_turns_absent_pages_into_zeros(ask: Any, backing: str) -> None:
    assert ask("lifetime", "last-close", backing) == {"touch": "byte:0"}


@both
def test_second_descriptor_keeps_absent_pages_waiting(ask: Any, backing: str) -> None:
    assert ask("lifetime", "second-descriptor", backing) == {"event": "pagefault", "byte": "7"}


@both
def test_fault_read_and_forgotten_comes_again_after_a_wake_of_the_range(ask: Any, backing: str) -> None:
    answers = ask("lifetime", "fault-read-and-forgotten", backing)
    assert answers == {"again_by_itself": "0", "wake": "0", "again_after_wake_offset": str(PAGE), "byte": "7"}


@both
def test_received_descriptor_acts_on_the_address_space_it_was_made_in(ask: Any, backing: str) -> None:
    answers = ask("lifetime", "received-descriptor", backing)
    assert answers == {"register": "0", "offset": str(PAGE), "copy": "0", "vmm_read": "7"}


@both
def test_kernel_mode_fault_is_served(ask: Any, backing: str) -> None:
    assert ask("lifetime", "kernel-mode-served", backing) == {"write": "0"}


@both
def test_user_mode_only_is_not_enough_for_a_kernel_mode_fault(ask: Any, backing: str) -> None:
    assert ask("lifetime", "user-mode-only", backing) == {"write": "EFAULT"}


@both
def test_balloon_waits_until_its_remove_event_is_read_and_ioctls_say_eagain_until_then(ask: Any, backing: str) -> None:
    answers = ask("lifetime", "remove-event", backing)
    assert (answers["done_before_read"], answers["copy_meanwhile"]) == ("0", "EAGAIN")
    assert (answers["event"], answers["start"], answers["bytes"]) == ("remove", "0", str(2 * PAGE))
    assert (answers["afterwards"], answers["byte"]) == ("pagefault", "0")


@both
def test_munmap_waits_until_its_unmap_event_is_read_and_ioctls_refuse_the_range(ask: Any, backing: str) -> None:
    answers = ask("lifetime", "unmap-event", backing)
    assert answers.pop("done_before_read") == "0"
    assert (answers.pop("event"), answers.pop("start"), answers.pop("bytes")) == ("unmap", "0", str(2 * PAGE))
    assert answers == {
        "copy_there": "ENOENT",
        "copy_across": "ENOENT",
        "unregister_there": "EINVAL",
        "unregister_across": "0",
    }


@both
def test_mremap_reports_the_move_then_the_old_range_and_keeps_the_registration(ask: Any, backing: str) -> None:
    answers = ask("lifetime", "remap-event", backing)
    assert (answers["first"], answers["from"], answers["bytes"]) == ("remap", "0", str(2 * PAGE))
    assert (answers["second"], answers["start"]) == ("unmap", "0")
    assert answers["touch_there"] == "pagefault"


@both
def test_mremap_without_its_event_drops_the_registration(ask: Any, backing: str) -> None:
    assert ask("lifetime", "remap-without-event", backing) == {"touch_there": "byte:0"}


@both
def test_fault_names_the_thread_that_waits(ask: Any, backing: str) -> None:
    assert ask("lifetime", "thread-id", backing) == {"same_thread": "1"}


def test_continue_maps_many_cached_pages_at_once_and_refuses_a_hole(ask: Any) -> None:
    answers = ask("lifetime", "continue-many", "shmem")
    assert answers == {"cached": "0", "mapped": "63", "hole": "EFAULT", "touch": "byte:7"}


@both
def test_a_page_belongs_to_one_userfaultfd_and_a_process_may_have_several(ask: Any, backing: str) -> None:
    assert ask("lifetime", "second-registration", backing) == {"first": "0", "same_page": "EBUSY", "other_page": "0"}
