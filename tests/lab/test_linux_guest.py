"""A Linux in an unmodified QEMU takes a machine check for a frame of its host that went bad, and lives."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.linux_guest import VARIABLE, LinuxGuest
from tests.support.contract.real_errors import PAGE, fail_frame, frame_at, mapping_of, why_not
from vmferry.demo.patience import patient

pytestmark = pytest.mark.timeout(300)

MEMORY = 160 << 20
CPU = "EPYC,+succor,+overflow-recov"
"""KVM shows a guest on SVM no MCG_SER_P: a Linux guest recovers only as an AMD with SUCCOR."""
BOOT_S = patient(60.0)
AFTER_S = patient(15.0)


@dataclass(frozen=True, slots=True)
class Guest:
    qemu: subprocess.Popen[bytes]
    log: Path

    @property
    def console(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, pattern: str, within_s: float) -> None:
        """Waits until the console has a match of this regular expression."""
        end = time.monotonic() + within_s
        while not re.search(pattern, self.console):
            assert self.qemu.poll() is None, f"QEMU ended: {self.console[-2000:]}"
            assert time.monotonic() < end, f"no {pattern!r} within {within_s:.0f} s: {self.console[-2000:]}"
            time.sleep(0.2)

    def page_with(self, contents: bytes) -> int:
        """Offset in its memory of a page in the midst of those with these contents."""
        start = mapping_of(self.qemu.pid, "memfd:", MEMORY)
        with Path(f"/proc/{self.qemu.pid}/mem").open("rb", buffering=0) as memory:
            read = os.pread(memory.fileno(), MEMORY, start)
        found = [at for at in range(0, MEMORY, PAGE) if read[at : at + PAGE] == contents]
        return found[len(found) // 2]

    def fail(self, offset: int) -> None:
        fail_frame(frame_at(self.qemu.pid, mapping_of(self.qemu.pid, "memfd:", MEMORY) + offset))


@pytest.fixture
def guest(kvm: Path, tmp_path: Path) -> Iterator[Guest]:
    linux = LinuxGuest.named()
    if linux is None:
        pytest.skip(f"make test-kernels runs it: no {VARIABLE}")
    if why := why_not():
        pytest.skip(why)
    models = subprocess.run([*linux.qemu, "-cpu", "help"], capture_output=True, text=True, check=True).stdout
    if not re.search(r"\bsuccor\b", models):
        pytest.skip(f"{linux.qemu[0]} has no CPU with SUCCOR: it came with QEMU 9.1")
    log = tmp_path / "console"
    command = [
        *linux.qemu,
        *("-nodefaults", "-display", "none", "-no-reboot", "-m", f"{MEMORY >> 20}M"),
        *("-machine", "q35,accel=kvm,memory-backend=ram", "-cpu", CPU),
        *("-object", f"memory-backend-memfd,id=ram,size={MEMORY >> 20}M"),
        *("-kernel", linux.kernel, "-initrd", linux.initrd, "-append", "console=ttyS0 panic=-1 mitigations=off"),
        *("-serial", f"file:{log}"),
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        yield Guest(qemu, log)
        qemu.kill()


def test_a_process_that_touches_a_bad_frame_is_signalled_and_its_linux_lives(guest: Guest) -> None:
    guest.until("guest: pass 0", BOOT_S)
    page = guest.page_with(b"A" * PAGE)
    guest.fail(page)
    # BUS_MCEERR_AR
    guest.until(r"guest: lives ([3-9]|\d\d+), code 4 lsb 12, bad 4 KiB", AFTER_S)
    assert f"ADDR {page:x}" in guest.console
