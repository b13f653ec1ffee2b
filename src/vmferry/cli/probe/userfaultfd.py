"""userfaultfd: each probe runs in a child process and touches only its own memory.

No probe touches a page that waits for a handler. madvise shows the effect of poison without a SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from vmferry.cli.probe import libc
from vmferry.cli.probe.attempt import attempt
from vmferry.cli.probe.finding import Finding, missing, ok, warn

USERFAULTFD_DEVICE = "/dev/userfaultfd"
EHWPOISON = 133


def open_userfaultfd() -> tuple[int, str]:
    """Opens a userfaultfd that also handles kernel faults, KVM's among them. Returns it with the way it was opened.

    Raises:
        OSError: of the system call, if the device gives none either.
    """
    try:
        return libc.userfaultfd(0), "system call"
    except OSError:
        try:
            device = os.open(USERFAULTFD_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pass
        else:
            new = libc.ioctl(device, libc.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK, USERFAULTFD_DEVICE)
            os.close(device)
            return new, USERFAULTFD_DEVICE
        raise


def _with_features(features: int) -> int:
    fd, _ = open_userfaultfd()
    libc.uffd_api(fd, features)
    return fd


def try_kernel_faults() -> str:
    fd, how = open_userfaultfd()
    features = libc.uffd_api(fd, 0)
    return f"by {how}, kernel faults included, features {features:#x}"


def try_user_mode_only() -> str:
    libc.uffd_api(libc.userfaultfd(libc.UFFD_USER_MODE_ONLY), 0)
    return "user-mode faults only"


def try_poison() -> str:
    """Checks that a marker can be set on an absent page, is seen there, and stays."""
    fd = _with_features(libc.FEATURE_POISON)
    address = libc.mmap(2 * libc.PAGE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    libc.register(fd, address, 2 * libc.PAGE, libc.REGISTER_MODE_MISSING)
    libc.ioctl(fd, libc.UFFDIO_POISON, bytearray(struct.pack("=QQQq", address, libc.PAGE, 0, 0)), "UFFDIO_POISON")
    seen = libc.madvise_errno(address, libc.PAGE, libc.MADV_POPULATE_READ)
    if seen != EHWPOISON:
        raise OSError(seen, f"a poisoned page answers madvise with errno {seen}, not EHWPOISON")
    return "UFFDIO_POISON places a marker"


def try_poison_signal() -> str:
    """Touches a marker as a vCPU's thread would."""
    fd = _with_features(libc.FEATURE_POISON)
    address = libc.mmap(libc.PAGE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    libc.register(fd, address, libc.PAGE, libc.REGISTER_MODE_MISSING)
    libc.ioctl(fd, libc.UFFDIO_POISON, bytearray(struct.pack("=QQQq", address, libc.PAGE, 0, 0)), "UFFDIO_POISON")

    def mend() -> None:
        os.close(fd)
        libc.madvise_errno(address, libc.PAGE, libc.MADV_DONTNEED)

    code, lsb = libc.signal_of_touch(address, mend)
    names = {libc.BUS_MCEERR_AR: "BUS_MCEERR_AR", libc.BUS_ADRERR: "BUS_ADRERR"}
    if code not in names:
        raise OSError(errno.EIO, f"a touch of a marker gives SIGBUS with code {code}")
    return f"a thread that touches poison gets SIGBUS {names[code]}, si_addr_lsb {lsb}"


def try_minor() -> str:
    """Checks that UFFDIO_CONTINUE maps a page from a memfd's page cache."""
    memory = os.memfd_create("probe")
    os.write(memory, b"vmferry!" * (libc.PAGE // 8))
    fd = _with_features(libc.FEATURE_MINOR_SHMEM)
    address = libc.mmap(libc.PAGE, libc.MAP_SHARED, memory)
    libc.register(fd, address, libc.PAGE, libc.REGISTER_MODE_MINOR)
    argument = bytearray(struct.pack("=QQQq", address, libc.PAGE, 0, 0))
    libc.ioctl(fd, libc.UFFDIO_CONTINUE, argument, "UFFDIO_CONTINUE")
    if ctypes.string_at(address, 8) != b"vmferry!":
        raise OSError(errno.EIO, "UFFDIO_CONTINUE mapped other bytes than the page cache's")
    return "UFFDIO_CONTINUE maps pages of a memfd"


def _written_pages(pagemap: int, address: int, pages: int) -> set[int]:
    """Returns the pages written since the last scan, and arms them again."""
    regions = bytearray(24 * pages)
    buffer = (ctypes.c_char * len(regions)).from_buffer(regions)
    flags = libc.PM_SCAN_WP_MATCHING | libc.PM_SCAN_CHECK_WPASYNC
    written = libc.PAGE_IS_WRITTEN
    end = address + pages * libc.PAGE
    argument = bytearray(
        struct.pack("=12Q", 96, flags, address, end, 0, ctypes.addressof(buffer), pages, 0, 0, written, 0, written)
    )
    count = libc.ioctl(pagemap, libc.PAGEMAP_SCAN, argument, "PAGEMAP_SCAN")
    found: set[int] = set()
    for index in range(count):
        first, last, _ = struct.unpack_from("=QQQ", regions, 24 * index)
        found.update((at - address) // libc.PAGE for at in range(first, last, libc.PAGE))
    return found


def try_dirty_tracking() -> str:
    """Checks that PAGEMAP_SCAN finds the one written page of four."""
    pages = 4
    fd = _with_features(libc.FEATURE_WP_ASYNC | libc.FEATURE_WP_UNPOPULATED | libc.FEATURE_PAGEFAULT_FLAG_WP)
    address = libc.mmap(pages * libc.PAGE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    ctypes.memset(address, 1, pages * libc.PAGE)
    libc.register(fd, address, pages * libc.PAGE, libc.REGISTER_MODE_WP)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    _written_pages(pagemap, address, pages)
    ctypes.memset(address + 2 * libc.PAGE, 2, 1)
    found = _written_pages(pagemap, address, pages)
    if found != {2}:
        raise OSError(errno.EIO, f"wrote page 2, PAGEMAP_SCAN told of {sorted(found)}")
    return "write-protect async with PAGEMAP_SCAN finds written pages"


def check_userfaultfd() -> Finding:
    name = "userfaultfd"
    full = attempt(try_kernel_faults)
    if full.worked:
        return ok(name, full.seen)
    todo = (
        "A VMM needs faults of the kernel too: give it CAP_SYS_PTRACE or access to /dev/userfaultfd, "
        "or set vm.unprivileged_userfaultfd=1; the kernel needs CONFIG_USERFAULTFD."
    )
    limited = attempt(try_user_mode_only)
    return missing(name, f"{full.seen}; {limited.seen}", todo)


def check_poison() -> Finding:
    found = attempt(try_poison)
    if found.worked:
        return ok("poison", found.seen)
    return missing("poison", found.seen, "UFFDIO_POISON came with Linux 6.6: use that or a later kernel.")


def check_poison_signal() -> Finding:
    found = attempt(try_poison_signal)
    if found.worked:
        return ok("poison signal", found.seen)
    return warn("poison signal", found.seen, "VMMs that are no KVM learn of poison by SIGBUS: use Linux 6.6 or newer.")


def check_minor() -> Finding:
    found = attempt(try_minor)
    if found.worked:
        return ok("minor faults", found.seen)
    return warn(
        "minor faults", found.seen, "Pages of memfds are copied in; Linux 5.14 and later can map them in place."
    )


def check_dirty_tracking() -> Finding:
    found = attempt(try_dirty_tracking)
    if found.worked:
        return ok("dirty tracking", found.seen)
    return warn(
        "dirty tracking", found.seen, "Precopy without the VMM's help needs Linux 6.7; postcopy does not need it."
    )
