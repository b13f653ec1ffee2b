"""QEMU's trace log."""

from __future__ import annotations

from vmferry_bench.trace import waits_us

ASK = "71@100.{:06}:postcopy_ram_fault_thread_request Request for HVA=0x{:x} rb=ram offset=0x{:x} pid=0"
PLACE = "71@100.{:06}:postcopy_place_page host=0x{:x}"
BASE = 0x7F0000000000


def ask(us: int, page: int, offset: int = 0) -> str:
    return ASK.format(us, BASE + page * 4096 + offset, page * 4096)


def place(us: int, page: int) -> str:
    return PLACE.format(us, BASE + page * 4096)


def test_a_wait_is_from_request_to_placed() -> None:
    assert waits_us([ask(100, 1), place(150, 2), place(400, 1)]) == [300.0]


def test_the_address_need_not_be_that_of_the_page() -> None:
    assert waits_us([ask(100, 1, offset=0x123), place(130, 1)]) == [30.0]


def test_a_page_asked_for_twice_counts_once_from_the_first() -> None:
    assert waits_us([ask(100, 1), ask(200, 1), place(300, 1), place(400, 1)]) == [200.0]


def test_a_page_that_came_before_its_request_or_never_is_no_wait() -> None:
    assert waits_us([place(100, 1), ask(200, 1)]) == []


def test_a_page_of_zeros_is_placed_too_and_other_lines_do_not_matter() -> None:
    zero = place(220, 3).replace("place_page", "place_page_zero")
    assert waits_us(["", "qemu: a warning", "71@100.000200:postcopy_place_page", ask(200, 3), zero]) == [20.0]


def test_a_second_may_pass_in_between() -> None:
    assert waits_us([ask(999_990, 1), place(10, 1).replace("@100.", "@101.")]) == [20.0]
