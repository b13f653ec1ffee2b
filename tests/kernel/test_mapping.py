"""A second mapping of a VM's memfd, as the pagers have it."""

from __future__ import annotations

from typing import Any


def test_mincore_tells_a_hole_from_data_and_fills_nothing(ask: Any) -> None:
    answers = ask("mapping", "residence", "shmem")
    assert answers == {"hole": "0", "data": "1", "held": "1", "populate_data": "0", "held_then": "1"}


def test_a_hole_that_is_read_through_a_mapping_is_filled(ask: Any) -> None:
    assert ask("mapping", "touched-hole", "shmem") == {"held": "0", "touch": "byte:0", "held_then": "1"}


def test_a_page_that_is_gone_is_efault_to_a_send_and_a_signal_to_a_read(ask: Any) -> None:
    assert ask("mapping", "sent-page-goes", "shmem") == {"sent": "8", "gone": "EFAULT", "touch": "sigbus"}


def test_bytes_received_through_one_mapping_are_mapped_into_the_other_without_an_event(ask: Any) -> None:
    answers = ask("mapping", "received-in-place", "shmem")
    assert answers == {"populate": "0", "received": "4096", "event": "EAGAIN", "continue": "0", "touch": "byte:7"}


def test_a_huge_page_is_made_ahead_only_where_no_uffd_watches_the_rest(ask: Any) -> None:
    answers = ask("mapping", "huge-page-ahead", "shmem")
    assert answers == {
        "registered": "EBUSY",
        "unregistered": "0",
        "held": "512",
        "continue": "0",
        "touch": "byte:0",
    }
