"""Thin wrappers of system calls that Python has no function for. x86-64 Linux.

Sources: ioctl_userfaultfd(2), userfaultfd(2), linux/userfaultfd.h, linux/fs.h (PAGEMAP_SCAN), madvise(2), sigaction(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable

PAGE = 4096

SYS_USERFAULTFD = 323
SYS_MADVISE = 28
USERFAULTFD_IOC_NEW = 0xAA00
UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_CONTINUE = 0xC020AA07
UFFDIO_POISON = 0xC020AA08
REGISTER_MODE_MISSING, REGISTER_MODE_WP, REGISTER_MODE_MINOR = 1, 2, 4
FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_MINOR_SHMEM = 1 << 10
FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_POISON = 1 << 14
FEATURE_WP_ASYNC = 1 << 15

PAGEMAP_SCAN = 0xC0606610
PAGE_IS_WRITTEN = 1 << 1
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2

MADV_DONTNEED = 4
MADV_POPULATE_READ = 22
MADV_HWPOISON = 100
SA_SIGINFO = 4
BUS_ADRERR, BUS_MCEERR_AR = 2, 4
CLONE_NEWNET = 0x40000000
PROT_READ_WRITE = 3
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_HUGETLB = 0x01, 0x02, 0x20, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.syscall.restype = ctypes.c_long
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def _failed(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def mmap(size: int, flags: int, fd: int = -1) -> int:
    """Address of a new mapping, read and write.

    Raises:
        OSError: as mmap(2).
    """
    address = _libc.mmap(None, size, PROT_READ_WRITE, flags, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _failed("mmap")
    return int(address)


def madvise_errno(address: int, size: int, advice: int) -> int:
    """Returns 0, or the errno of madvise(2)."""
    ctypes.set_errno(0)
    arguments = [ctypes.c_long(value) for value in (SYS_MADVISE, address, size, advice)]
    return 0 if _libc.syscall(*arguments) == 0 else ctypes.get_errno()


def userfaultfd(flags: int) -> int:
    """A userfaultfd by the system call.

    Raises:
        OSError: EPERM without privilege and with vm.unprivileged_userfaultfd=0, unless UFFD_USER_MODE_ONLY.
    """
    fd = _libc.syscall(ctypes.c_long(SYS_USERFAULTFD), ctypes.c_long(flags | os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise _failed("userfaultfd")
    return int(fd)


def ioctl(fd: int, request: int, argument: bytearray | int, what: str) -> int:
    """ioctl(2) with a number or with a structure that the kernel fills in.

    Raises:
        OSError: named by `what`.
    """
    if isinstance(argument, int):
        result = _libc.ioctl(fd, request, argument)
    else:
        buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
        result = _libc.ioctl(fd, request, ctypes.addressof(buffer))
    if result < 0:
        raise _failed(what)
    return int(result)


def uffd_api(fd: int, features: int) -> int:
    """Negotiates the API with these features. Returns the features that the kernel has."""
    argument = bytearray(struct.pack("=QQQ", UFFD_API, features, 0))
    ioctl(fd, UFFDIO_API, argument, "UFFDIO_API")
    return int(struct.unpack("=QQQ", argument)[1])


def register(fd: int, address: int, size: int, mode: int) -> None:
    ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("=QQQQ", address, size, mode, 0)), "UFFDIO_REGISTER")


def unshare_network() -> None:
    """Moves the calling process into a network namespace of its own.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN.
    """
    if _libc.unshare(CLONE_NEWNET) != 0:
        raise _failed("unshare(CLONE_NEWNET)")


class _SignalAction(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def signal_of_touch(address: int, mend: Callable[[], None]) -> tuple[int, int]:
    """Code and `si_addr_lsb` of the SIGBUS that a read at the address raises; zeros if it raises none.

    Only for a child process: the handler stays. `mend` makes the page readable, else the read raises SIGBUS for ever.

    Raises:
        OSError: sigaction(2).
    """
    seen = [(0, 0)]

    def note(_signal: int, info: int, _context: int) -> None:
        words = ctypes.string_at(info, 26)
        seen[0] = (*struct.unpack_from("=i", words, 8), *struct.unpack_from("=h", words, 24))
        mend()

    handler = _HANDLER(note)
    action = _SignalAction(handler=ctypes.cast(handler, ctypes.c_void_p), flags=SA_SIGINFO)
    if _libc.sigaction(signal.SIGBUS, ctypes.byref(action), None) != 0:
        raise _failed("sigaction(SIGBUS)")
    ctypes.string_at(address, 1)
    return seen[0]


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_process(pid: int, address: int, size: int) -> bytes:
    """Memory of another process.

    Raises:
        OSError: EPERM without CAP_SYS_PTRACE or against the Yama policy; EFAULT for an absent or poisoned page.
    """
    buffer = ctypes.create_string_buffer(size)
    local = _Iovec(ctypes.addressof(buffer), size)
    remote = _Iovec(address, size)
    count = _libc.process_vm_readv(
        pid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1), ctypes.c_ulong(0)
    )
    if count < 0:
        raise _failed("process_vm_readv")
    return buffer.raw[:count]
