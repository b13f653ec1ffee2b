"""Any text as a rate or as a list of CPUs: a value within bounds, or a message that names the fault."""

from __future__ import annotations

import argparse

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmferry.cli.values import push_limit
from vmferry.daemon.cpu_list import CPU_MOST, CpuListError, parse_cpu_list
from vmferry.units import PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST, RATE_UNITS

numbers = st.integers(0, 10**19).map(str) | st.decimals(0, 10**9, places=3).map(str) | st.text(max_size=6)
rates = st.builds("{}{}{}".format, numbers, st.sampled_from([*RATE_UNITS, "", "x"]), st.sampled_from(["/s", "", "/m"]))
parts = st.integers(0, 10**5).map(str) | st.tuples(st.integers(0, 9000), st.integers(0, 9000)).map(
    "{0[0]}-{0[1]}".format
)


@settings(max_examples=500, deadline=None)
@given(rates | st.text())
@example("9" * 400 + "GiB/s")
def test_any_rate(text: str) -> None:
    try:
        value = push_limit(text)
    except argparse.ArgumentTypeError as error:
        assert repr(text) in str(error)
    else:
        assert value == 0 or PUSH_LIMIT_LEAST <= value <= PUSH_LIMIT_MOST


@settings(max_examples=500, deadline=None)
@given(st.text() | st.lists(parts | st.text(max_size=3), max_size=6).map(",".join))
def test_any_list_of_cpus(text: str) -> None:
    try:
        cpus = parse_cpu_list(text)
    except CpuListError as error:
        assert str(error)
    else:
        assert all(0 <= cpu <= CPU_MOST for cpu in cpus)
        assert parse_cpu_list(",".join(str(cpu) for cpu in sorted(cpus))) == cpus


@given(st.sets(st.tuples(st.integers(0, 800), st.integers(0, 9)), max_size=20))
def test_written_input_is_read_back(runs: set[tuple[int, int]]) -> None:
    apart = {10 * first: length for first, length in runs}
    text = ",".join(f"{first}-{first + length}" for first, length in apart.items())
    assert parse_cpu_list(text) == {cpu for first, length in apart.items() for cpu in range(first, first + length + 1)}
