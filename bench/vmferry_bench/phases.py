"""Which phase of a fault's way a sampled stack belongs to, and the shares of all: pure.

A stack is a line of folded stacks, `thread;outermost;...;innermost NS`. The first rule that any frame of it answers
names its phase, so what is inside of something else comes before it: a wake-up in a send is a wake-up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_RULES = (
    ("wake of a faulting thread", r"wake_userfault|userfaultfd_wake"),
    (
        "wake of another thread",
        r"try_to_wake_up|wake_up_q|ttwu_|eventfd_write|sock_def_readable|__wake_up_common|ep_poll_callback",
    ),
    ("scheduler", r"^__schedule$|^schedule($|_)|finish_task_switch|^do_idle$|schedule_tail"),
    ("uffd read", r"userfaultfd_(read|poll|ctx_read)"),
    ("memory made ready, mapped", r"madvise|fallocate|mincore"),
    ("write to the guest's file", r"vfs_pwrite|ksys_pwrite|shmem_file_write|__x64_sys_pwrite64"),
    ("install ioctl", r"mfill_atomic|userfaultfd_(ioctl|copy|continue|zeropage|poison)"),
    (
        "read of guest memory",
        r"process_vm_r|shmem_file_read|shmem_get_folio|vfs_pread|ksys_pread|filemap_read|pagemap_",
    ),
    ("send", r"sendfile|splice_|sock_sendmsg|sock_write_iter|tcp_sendmsg|__sys_sendto|__sys_sendmsg"),
    ("receive", r"sock_recvmsg|sock_read_iter|tcp_recvmsg|__sys_recvfrom|__sys_recvmsg"),
    ("wait for events", r"do_epoll|epoll_wait|do_sys_poll|^ppoll$|do_futex|futex_wait|lock_contended|clock_nanosleep"),
    ("faults and mappings of its own", r"handle_mm_fault|exc_page_fault|do_mmap|do_munmap|munmap|zap_|unmap_"),
    ("begin and end of the process", r"do_exit|execve|exit_mm|kernel_clone"),
    ("copies and allocations", r"^__mem(move|cpy|set)|^_int_(malloc|free)|^(m|c|re)alloc$|^c?free$|unlink_chunk"),
    ("gRPC", r"\b(tonic|h2|hyper|hyper_util|tower|prost)::"),
)
_OWN = re.compile(r"vmferry_pager::")
_LOOP = re.compile(r"\b(tokio|mio|futures_\w+)::")
_KERNEL = re.compile(r"entry_SYSCALL|asm_|do_syscall|ret_from_fork|syscall_")
_PHASES = tuple((name, re.compile(pattern)) for name, pattern in _RULES)


def phase(frames: Iterable[str]) -> str:
    """Of one stack, without the thread's name."""
    every = list(frames)
    for name, pattern in _PHASES:
        if any(map(pattern.search, every)):
            return name
    if any(map(_KERNEL.search, every)):
        return "other kernel"
    for frame in reversed(every):
        if _OWN.search(frame):
            return "the pager's own code"
        if _LOOP.search(frame):
            return "event loop"
    return "other"


def times(folded: Iterable[str]) -> dict[str, int]:
    """ns on a processor by phase, most first."""
    found: dict[str, int] = {}
    for line in folded:
        stack, _, ns = line.rstrip().rpartition(" ")
        if stack and ns.isdigit():
            name = phase(stack.split(";")[1:])
            found[name] = found.get(name, 0) + int(ns)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def shares(sides: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A Markdown table: each side's phases, as shares of that side's time and of all."""
    whole = sum(sum(phases.values()) for phases in sides.values())
    lines = ["| pager | phase | on a processor, ms | of this pager | of both |", "|---|---|---|---|---|"]
    for side, phases in sides.items():
        own = sum(phases.values())
        lines += [
            f"| {side} | {name} | {ns / 1e6:.1f} | {ns / own:.1%} | {ns / whole:.1%} |" for name, ns in phases.items()
        ]
    return lines
