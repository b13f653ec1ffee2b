"""Tables and plots: generated from the result alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from vmferry_bench.__main__ import faults_of_ours, result
from vmferry_bench.machine import machine_words
from vmferry_bench.native import BenchError
from vmferry_bench.plot import plot_all
from vmferry_bench.shape import OURS, PLAIN, PREEMPT, Alone, Many, Singles
from vmferry_bench.table import _PAPER, BEGIN, END, put, table, write_docs

from tests.support.bench_rounds import GUEST, IDLE, a_round

WHERE = {"cpu": "a processor", "cores": 2, "kernel": "6.18", "qemu": "QEMU 7.2", "at": "now"}
ROUNDS = [a_round(OURS), a_round(PREEMPT, wait_us=4000.0), a_round(PLAIN), a_round(OURS, IDLE)]


def test_the_table_names_unmeasured_figures() -> None:
    text = table(result(ROUNDS, [], Alone(), WHERE))
    assert "| memfd: poisoned page / data page, answer, p50 | ≤ 1 | - |  | not measured |" in text
    assert "| anonymous: poisoned page / data page, answer, p50 | ≤ 1 | - |  | not measured |" in text
    assert GUEST.name in text


def test_the_page_keeps_handwritten_text(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_docs(tmp_path, result(ROUNDS, ["qemu-plain: it did not come up", "word " * 30], Alone(), WHERE))
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count(BEGIN) == text.count(END) == 1
        assert "- qemu-plain: it did not come up" in text
        assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))
        assert "| measure | goal |" in text
        assert "| guest | side |" not in text
        raw = (tmp_path / "raw" / "bench.md").read_text()
        assert raw.startswith("# Raw figures of `make bench`\n")
        assert raw.count("| guest | side |") == 2


@pytest.mark.parametrize("page", ["results.md", "one-fault.md"])
def test_the_published_pages_have_the_marks(page: str, tmp_path: Path) -> None:
    copy = tmp_path / page
    copy.write_text((Path(__file__).parents[3] / "docs" / "performance" / page).read_text())
    put(copy, "renewed")
    assert f"{BEGIN}\nrenewed\n{END}" in copy.read_text()


def test_figures_measured_alone_are_in_the_table() -> None:
    q = {"count": 3.0, "p50": 41.0, "p90": 42.0, "p99": 43.0, "max": 44.0}
    many = [Many(n, pause, [700.0] * n, [90.0] * n, [300.0] * n, 0.5) for n in (1, 16) for pause in (0, 2000)]
    paper = dict.fromkeys((size for _, size, _ in _PAPER), float(64 << 20)) | {"pages": float(1 << 28), "anew_s": 0.5}
    text = table(result(ROUNDS, [], Alone({"memfd": Singles(floor_us=q)}, many, paper), WHERE))
    assert "| userfaultfd over TCP, nothing else (the floor) | memfd | 3 | 41 | 42 | 43 | 44 |" in text
    assert "fall, a pause of 2 ms | ≤ 0.2 | 0 | 0 to 0; 50% of the cores busy with 16 | yes |" in text
    assert "| 16 | 2 | 50% | 700 | 700 to 700 | 11200 | 90 | 90 | 300 | 300 |" in text
    assert text.index("| 16 | 2 |") < text.index("| 16 | 0 |")
    assert "| page table, with holes | 64.0 MiB | 0.250 | 0.500 |" in text


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for words in ("no marks", f"{BEGIN} only one", f"{END} {BEGIN} in the wrong order"):
        page.write_text(words)
        with pytest.raises(BenchError, match="no marks"):
            put(page, "tables")
        assert page.read_text() == words


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


@pytest.mark.parametrize(("real_time", "thread"), [(True, "a real-time thread"), (False, "may have no real-time one")])
def test_the_machine_names_withheld_facts(real_time: bool, thread: str) -> None:
    where = {"cpu": "a processor", "cores": 2, "kernel": "6.18", "qemu": "none", "at": "now"}
    assert machine_words(where) == "a processor, 2 cores, Linux 6.18; none; now."
    paced = machine_words({**where, "congestion_control": "cubic"})
    assert paced.endswith("Connections of QEMU and of the floor are paced by cubic.")
    late = {"seconds": 10.0, "cpus": 2, "real_time": real_time, "longest_ms": 9.87, "over_1_ms": 12}
    words = machine_words({**where, "late": late})
    assert thread in words
    assert "for 10 s. It woke up to 9.9 ms too late, and 12 times more than 1 ms." in words
