"""Fixtures that more than one kind of test needs: the programs under test, and what the machine must have.

A test that asks for `kvm`, `uffd_poison`, `namespaces` or `chromium` is skipped with the reason where the machine lacks
it. A missing program of ours is a failure, never a skip: `make setup` builds it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.programs import Programs, installed_programs
from vmferry.demo.options import why_not_kvm
from vmferry.demo.patience import patient
from vmferry.security.pki import Authority

# No test depends on the speed of the machine.
settings.register_profile("vmferry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vmferry")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Multiplies every test's time limit by `VMFERRY_PATIENCE`."""
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(limit_s)), append=False)


UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA
UFFD_FEATURE_POISON = 1 << 14
SYS_USERFAULTFD = 323


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority of this session."""
    return Authority.init(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def programs() -> Programs:
    """The installed programs."""
    return installed_programs()


@pytest.fixture(scope="session")
def kvm() -> Path:
    """`/dev/kvm`, where this process may use it."""
    device = Path("/dev/kvm")
    if why := why_not_kvm(device):
        pytest.skip(f"{device} cannot be used ({why}): no hardware virtualization for this user")
    return device


def uffd_features() -> int:
    """The userfaultfd feature bits of this kernel for this user; 0 where there is none at all."""
    fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return 0
    try:
        request = bytearray(struct.pack("=QQQ", UFFD_API, 0, 0))
        fcntl.ioctl(fd, UFFDIO_API, request)
        return int(struct.unpack("=QQQ", request)[1])
    finally:
        os.close(fd)


@pytest.fixture(scope="session")
def uffd_poison() -> None:
    """A userfaultfd that serves kernel-mode faults and knows UFFDIO_POISON (Linux 6.6)."""
    features = uffd_features()
    if features == 0:
        pytest.skip("userfaultfd is refused: it needs root, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1")
    if not features & UFFD_FEATURE_POISON:
        pytest.skip(f"Linux {os.uname().release} has no UFFDIO_POISON; it came with 6.6")


@pytest.fixture(scope="session")
def namespaces() -> None:
    """The right to make network namespaces, and the program for it."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing: apt-get install iproute2")
    name = f"vmferry-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium to look at the dashboard with."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.skip("no Chromium: apt-get install chromium")
