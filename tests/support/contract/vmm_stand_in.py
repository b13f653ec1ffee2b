"""A VMM in a process of its own, as far as a source's pager sees one: makes memory, fills it, attaches it, waits.

Arguments: backing (of huge pages where "hugetlb" is in it), number of pages, path of the memory socket. Page n holds
byte n % 251 + 1 throughout, but every fourth is left untouched. Prints the pager's answer with its own address. Lives
until its standard input closes.
"""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import signal
import socket
import sys

PAGE = 4096
HUGE_PAGE = 2 << 20
MAP_HUGETLB = 0x40000


def fill(memory: mmap.mmap, pages: int) -> None:
    for page in range(pages):
        if page % 4 != 3:
            memory[page * PAGE : (page + 1) * PAGE] = bytes([page % 251 + 1]) * PAGE


def attach(backing: str, pages: int, path: str) -> tuple[mmap.mmap, int, socket.socket]:
    """The memory, its address, and the connection."""
    size = pages * PAGE
    descriptors: list[int] = []
    huge = "hugetlb" in backing
    page_size = HUGE_PAGE if huge else PAGE
    if not backing.startswith("anonymous"):
        descriptor = os.memfd_create("guest", os.MFD_HUGETLB if huge else os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        descriptors.append(descriptor)
    else:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_HUGETLB if huge else 0))
    fill(memory, pages)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    region = {"gpa": 0, "base_host_virt_addr": hva, "size": size, "page_size": page_size, "backing": "anonymous"}
    if descriptors:
        region |= {"backing": "memfd", "fd": 0, "offset": 0}
    message = {"version": 1, "vm": "web-1", "role": "source", "pid": os.getpid(), "regions": [region]}
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([json.dumps(message).encode()], rights)
    return memory, hva, connection


def main() -> None:
    # A VMM asks the kernel for early errors, and outlives them.
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
    _memory, hva, connection = attach(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    with connection.makefile("rb") as answers:
        length = int.from_bytes(answers.read(4), "big")
        answer = json.loads(answers.read(length)) | {"hva": hva}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
