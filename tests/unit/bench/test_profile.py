"""Samples by phase, stages by the table, and which process is which pager."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmferry_bench.phases import phase, shares, times
from vmferry_bench.profile import samples_text, write_docs
from vmferry_bench.sampler import role_of
from vmferry_bench.shape import BACKINGS
from vmferry_bench.stages import STAGES, WHOLES, stages_table

SYSCALL = ["vmferry_pager::fault_loop::run", "entry_SYSCALL_64_after_hwframe", "do_syscall_64"]


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("uffd read", [*SYSCALL, "vfs_read", "userfaultfd_read", "userfaultfd_ctx_read"]),
        ("install ioctl", [*SYSCALL, "userfaultfd_ioctl", "mfill_atomic", "shmem_mfill_atomic_pte"]),
        ("install ioctl", [*SYSCALL, "userfaultfd_continue"]),
        ("wake of a faulting thread", [*SYSCALL, "userfaultfd_ioctl", "__wake_userfault", "try_to_wake_up"]),
        ("wake of another thread", [*SYSCALL, "tcp_sendmsg", "tcp_v4_rcv", "sock_def_readable", "try_to_wake_up"]),
        ("send", [*SYSCALL, "__sys_sendto", "tcp_sendmsg_locked", "skb_copy"]),
        ("send", [*SYSCALL, "do_sendfile", "splice_direct_to_actor", "shmem_file_splice_read"]),
        ("receive", [*SYSCALL, "__sys_recvfrom", "tcp_recvmsg"]),
        ("scheduler", [*SYSCALL, "tcp_recvmsg", "sk_wait_data", "schedule_timeout", "schedule", "__schedule"]),
        ("read of guest memory", [*SYSCALL, "process_vm_rw", "copy_page_to_iter"]),
        ("read of guest memory", [*SYSCALL, "ksys_pread64", "shmem_file_read_iter"]),
        ("memory made ready, mapped", [*SYSCALL, "madvise_populate", "handle_mm_fault", "shmem_get_folio_gfp"]),
        ("memory made ready, mapped", [*SYSCALL, "vfs_fallocate", "shmem_fallocate", "shmem_get_folio"]),
        ("write to the guest's file", [*SYSCALL, "vfs_pwrite", "shmem_file_write_iter", "shmem_get_folio_gfp"]),
        ("wait for events", [*SYSCALL, "do_epoll_wait"]),
        ("wait for events", ["[unknown]", "ppoll"]),
        ("wait for events", ["vmferry_pager::shared::Shared::lock", "<std::sync::Mutex>::lock_contended"]),
        ("faults and mappings of its own", ["vmferry_pager::install::copy", "asm_exc_page_fault", "handle_mm_fault"]),
        ("other kernel", [*SYSCALL, "__x64_sys_getpid"]),
        ("gRPC", ["vmferry_pager::demand::run", "<tonic::codec::Streaming<T>>::message", "h2::proto::poll"]),
        ("the pager's own code", ["std::thread::start", "vmferry_pager::page_table::PageTable::runs"]),
        ("the pager's own code", ["tokio::runtime::block_on", "vmferry_pager::install::Installer::install", "ioctl"]),
        ("event loop", ["vmferry_pager::program::run", "tokio::runtime::time::Driver::park_internal", "mio::poll"]),
        ("wake of another thread", [*SYSCALL, "ksys_write", "eventfd_write", "_raw_spin_unlock_irq"]),
        ("copies and allocations", ["[unknown]", "__memmove_avx512_unaligned_erms"]),
        ("copies and allocations", ["[unknown]", "_int_malloc"]),
        ("other", ["[unknown]", "write"]),
    ],
)
def test_the_phase_of_a_stack(name: str, frames: list[str]) -> None:
    assert phase(frames) == name


def test_times_are_added_up_by_phase_and_the_threads_name_is_none_of_it() -> None:
    lines = ["scheduler;a;tcp_sendmsg 3", "t;vmferry_pager::x y::z 1", "t;a;tcp_sendmsg;b 4", "", "no count"]
    assert times(lines) == {"send": 7, "the pager's own code": 1}


def test_shares_are_of_the_side_and_of_both() -> None:
    table = shares({"source": {"send": 30_000_000, "other": 10_000_000}, "destination": {"install ioctl": 60_000_000}})
    assert "| source | send | 30.0 | 75.0% | 30.0% |" in table
    assert "| destination | install ioctl | 60.0 | 100.0% | 60.0% |" in table


def test_a_pager_is_known_by_its_command_line() -> None:
    assert role_of(["/a/vmferry-pager", "--vm", "x", "--role", "source", ""]) == "source"
    assert role_of(["/a/vmferry-pager", "--role", "destination"]) == "destination"
    for other in (
        [],
        ["/a/vmferryd", "--role", "source"],
        ["vmferry-pager", "--role"],
        ["vmferry-pager", "--role", "x"],
    ):
        assert role_of(other) is None


def rows() -> dict[str, dict[str, float]]:
    """Of one backing: stages of 1, 2, 3, ... µs at the median."""
    names = [name for name, _ in (*STAGES, *WHOLES)]
    return {name: {"p50": float(n), "p90": 2.0 * n, "p99": 3.0 * n} for n, name in enumerate(names, 1)}


def test_the_sum_of_the_stages_stands_with_the_wholes() -> None:
    table = stages_table({"memfd": rows(), "anonymous": rows()})
    assert table.count("| **the stages added up** | 21.0 | 42.0 | 63.0 |") == len(BACKINGS)
    assert "| `UFFDIO_CONTINUE` of 4 KiB, nobody waiting | 5.0 | 10.0 | 15.0 |" in table
    assert "| `UFFDIO_COPY` of 4 KiB, nobody waiting | 5.0 | 10.0 | 15.0 |" in table


def test_the_page_says_why_there_are_no_samples() -> None:
    where = {"cpu": "a processor", "cores": 2, "kernel": "6.18", "qemu": "none", "at": "now"}
    found = {
        "machine": where,
        "guest": "g",
        "stages": {"memfd": rows()},
        "samples": {},
        "without": "perf is not installed",
    }
    assert samples_text(found).endswith("The pagers were not sampled: perf is not installed.")
    found |= {"samples": {"source": {"send": 2_000_000}}, "without": ""}
    assert samples_text(found).endswith("| source | send | 2.0 | 100.0% | 100.0% |")


def test_the_published_page_keeps_its_words(tmp_path: Path) -> None:
    page = Path(__file__).parents[3] / "docs" / "performance" / "one-fault.md"
    (tmp_path / page.name).write_text(page.read_text())
    where = {"cpu": "a processor", "cores": 2, "kernel": "6.18", "qemu": "none", "at": "now"}
    samples = {"source": {"send": 2_000_000}}
    write_docs(
        tmp_path, {"machine": where, "guest": "g", "stages": {"memfd": rows()}, "samples": samples, "without": ""}
    )
    text = (tmp_path / page.name).read_text()
    assert text.startswith("# Where a fault spends its time")
    assert "| **the stages added up** | 21.0 | 42.0 | 63.0 |" in text
    assert "| source | send | 2.0 |" in (tmp_path / "raw" / "profile.md").read_text()
