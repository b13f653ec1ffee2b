"""Tables and plots: generated from the result alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from rounds import GUEST, IDLE, a_round
from vmferry_bench.__main__ import faults_of_ours, result
from vmferry_bench.plot import plot_all
from vmferry_bench.shape import OURS, PLAIN, PREEMPT, Alone
from vmferry_bench.table import BEGIN, END, table, write_page

WHERE = {"cpu": "a processor", "cores": 2, "kernel": "6.18", "qemu": "QEMU 7.2", "at": "now"}
ROUNDS = [a_round(OURS), a_round(PREEMPT, wait_us=4000.0), a_round(PLAIN), a_round(OURS, IDLE)]


def test_the_table_says_what_is_not_measured() -> None:
    text = table(result(ROUNDS, [], Alone(), WHERE))
    assert "| poisoned page / data page, answer, p50 | ≤ 1 | - |  | not measured |" in text
    assert GUEST.name in text


def test_the_page_keeps_what_somebody_wrote(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_page(page, result(ROUNDS, ["qemu-plain: it did not come up"], Alone(), WHERE))
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count(BEGIN) == text.count(END) == 1
        assert "qemu-plain: it did not come up" in text


def test_plots_are_svg_with_a_line_for_each_side(tmp_path: Path) -> None:
    latency, throughput = (ET.parse(path).getroot() for path in plot_all(ROUNDS, tmp_path))  # our own
    for root in (latency, throughput):
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {OURS, PREEMPT, PLAIN} <= set(words)


def test_a_fault_of_ours_fails_the_run_and_one_of_qemu_does_not() -> None:
    assert not faults_of_ours(result(ROUNDS, ["qemu-plain: gone"], Alone(), WHERE))
    assert faults_of_ours(result([*ROUNDS, a_round(OURS, faults="a page was lost")], [], Alone(), WHERE))
    assert faults_of_ours(result([*ROUNDS, a_round(OURS, wrong_bytes=3)], [], Alone(), WHERE))
    assert faults_of_ours(result(ROUNDS, ["vmferry, random: no answer"], Alone(), WHERE))
