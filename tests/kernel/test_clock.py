"""The wall clock that a host can have. The kernel checks a time before it asks for the right to set it."""

from __future__ import annotations

import errno
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from vmferry.demo.patience import patient

CHILD = """
import os, sys, time
if os.geteuid() == 0:
    os.setuid(65534)  # It may not set the clock of this host.
try:
    time.clock_settime(time.CLOCK_REALTIME, float(sys.argv[1]))
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize(
    ("seconds", "refusal"),
    [
        (-1.0, errno.EINVAL),
        (datetime(2233, 1, 1, tzinfo=UTC).timestamp(), errno.EINVAL),
        (datetime(2231, 1, 1, tzinfo=UTC).timestamp(), errno.EPERM),
    ],
    ids=["before 1970", "beyond 2232", "in between"],
)
def test_no_clock_is_set_before_1970_or_beyond_2232(seconds: float, refusal: int) -> None:
    command = [sys.executable, "-I", "-c", CHILD, str(seconds)]
    child = subprocess.run(command, capture_output=True, check=False, timeout=patient(30))
    assert child.stdout.strip() == str(refusal).encode(), child.stderr.decode()
