"""CPU lists: their CPUs, and the faults of texts that are no CPU list."""

from __future__ import annotations

import pytest

from vmferry.daemon.cpu_list import CpuListError, parse_cpu_list


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("0", {0}), ("2-3,7", {2, 3, 7}), ("7,2-3", {2, 3, 7}), ("8191", {8191}), ("4-4", {4})],
)
def test_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3-2", "'3-2' runs backwards"),
        ("1,1", "CPU 1 comes twice"),
        ("0-4,9,3-5", "CPU 3 comes twice"),
        ("8192", "'8192' goes beyond CPU 8191"),
        ("0-99999", "'0-99999' goes beyond CPU 8191"),
        ("1,", "'' is neither a CPU nor a range of CPUs"),
        (" 1", "' 1' is neither a CPU nor a range of CPUs"),
        ("1-2-3", "'1-2-3' is neither a CPU nor a range of CPUs"),
        ("-1", "'-1' is neither a CPU nor a range of CPUs"),
        ("0-7:2", "'0-7:2' is neither a CPU nor a range of CPUs"),
        ("\u0665", "'\u0665' is neither a CPU nor a range of CPUs"),
        ("all", "'all' is neither a CPU nor a range of CPUs"),
    ],
)
def test_a_wrong_value_is_named(text: str, said: str) -> None:
    with pytest.raises(CpuListError) as caught:
        parse_cpu_list(text)
    assert str(caught.value) == said
