"""Runs a program as on a kernel without UFFDIO_POISON: a seccomp filter answers UFFDIO_API with EINVAL.

Usage: without_poison.py PROGRAM [ARGUMENT…]. seccomp(2); BPF as in linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
NUMBER_AT, SECOND_ARGUMENT_AT = 0, 24
SYS_IOCTL = 16
UFFDIO_API = 0xC018AA3F


def main() -> None:
    program = [
        (LOAD_WORD, 0, 0, NUMBER_AT),
        (JUMP_EQUAL, 0, 3, SYS_IOCTL),
        (LOAD_WORD, 0, 0, SECOND_ARGUMENT_AT),
        (JUMP_EQUAL, 0, 1, UFFDIO_API),
        (RETURN, 0, 0, RET_ERRNO | errno.EINVAL),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filter_ = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]})")
    os.execv(sys.argv[1], sys.argv[1:])


main()
