"""Boots a kernel over this machine's own files, runs a command in it as root, and returns its exit status.

The guest's root is this machine's, by virtiofs, under an overlay in its memory. Programs built here run there at
the same paths. Only `/out` (`out` here) outlives the guest. Its two vCPUs have nested SVM, so it has a KVM.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.debian import CACHE, Kernel, LackingError, emulator, file_server, kernel, say, tools

HERE = Path(__file__).parent
START_S = 60.0
NO_STATUS = 125
TOO_LATE = 124


def end_by_signal() -> None:
    """Makes SIGTERM, and SIGINT in the background, end this process by an exception: the guest ends with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


@dataclass(frozen=True, slots=True)
class Ended:
    """`cpu_s`: the emulator's; a quiet machine with two cores needs about half of it."""

    status: int
    elapsed_s: float
    cpu_s: float


@contextmanager
def served(folder: Path, tag: str, run: Path, cache: str) -> Iterator[list[str]]:
    """A folder of this machine for the guest; QEMU's options for it."""
    socket = run / f"{tag}.sock"
    words = [file_server(), f"--socket-path={socket}", "-o", f"source={folder}", "-o", f"cache={cache}"]
    with (run / f"{tag}.log").open("wb") as log:
        process = subprocess.Popen([*words, "-o", "sandbox=chroot"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise LackingError(f"virtiofsd does not start: {(run / f'{tag}.log').read_text()[-600:]}")
            time.sleep(0.02)
        device = f"vhost-user-fs-pci,chardev=c{tag},tag={tag},queue-size=1024"
        yield ["-chardev", f"socket,id=c{tag},path={socket}", "-device", device]
    finally:
        process.terminate()
        process.wait()


def emulator_words(booted: Kernel, run: Path, memory: str) -> list[str]:
    line = [
        f"root=root rootfstype=virtiofs ro init={run}/init.sh console=ttyS0 panic=-1",
        "mitigations=off nokaslr random.trust_cpu=on no_timer_check tsc=reliable",
        f"LAB_TOOLS={tools()} LAB_KERNEL={booted.where} LAB_HERE={run}",
    ]
    return [
        *emulator(),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35,memory-backend=mem", "-accel", "tcg,thread=multi,tb-size=512"),
        *("-cpu", "max,+svm,-la57", "-smp", "2", "-m", memory),
        *("-object", f"memory-backend-memfd,id=mem,size={memory},share=on"),
        *("-kernel", str(booted.image), "-append", " ".join(line), "-serial", f"file:{run}/console.log"),
        *("-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"),
        *("-device", "virtio-rng-pci"),
    ]


def run_in(
    booted: Kernel,
    command: str,
    out: Path,
    *,
    memory: str = "4G",
    limit_s: float = 3600,
    look: Callable[[], None] = lambda: None,
) -> Ended:
    """Calls `look` several times a second while the guest runs.

    Raises: LackingError: the emulator cannot run here.
    """
    run = out.absolute() / ".run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "command").write_text(f"{command}\n")
    for name in ("init.sh", "system.sh"):
        shutil.copy(HERE / name, run)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    # Files that change here while the guest runs are not seen there: looking each time costs too much.
    with served(Path("/"), "root", run, "always") as root, served(out.absolute(), "out", run, "auto") as shared:
        qemu = subprocess.Popen([*emulator_words(booted, run, memory), *root, *shared], stdin=subprocess.DEVNULL)
        try:
            late = False
            while qemu.poll() is None and not late:
                time.sleep(0.2)
                look()
                late = time.monotonic() > began + limit_s
        finally:
            qemu.kill()
            qemu.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    look()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    status = int((run / "status").read_text()) if (run / "status").exists() else TOO_LATE if late else NO_STATUS
    if status == NO_STATUS:
        say(f"the guest ended without a status; the end of {run}/console.log:")
        say((run / "console.log").read_text(errors="replace")[-1500:])
    return Ended(status, time.monotonic() - began, cpu_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", default="6.12", help="a version, or the begin of one (6.12)")
    parser.add_argument("--memory", default="4G", help="of the guest (4G)")
    parser.add_argument("--out", type=Path, default=CACHE / "out", help="the guest's /out (target/lab/out)")
    parser.add_argument("--limit", type=float, default=3600, metavar="SECONDS", help="(3600)")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    end_by_signal()
    words = arguments.command
    command = words[0] if len(words) == 1 else shlex.join(words)
    try:
        booted = kernel(arguments.kernel)
        ended = run_in(
            booted,
            f"cd {shlex.quote(str(Path.cwd()))}\n{command}",
            arguments.out,
            memory=arguments.memory,
            limit_s=arguments.limit,
        )
    except LackingError as error:
        say(f"skipped: {error}")
        return 0
    say(f"exit status {ended.status} after {ended.elapsed_s:.0f} s, {ended.cpu_s:.0f} s of processor time")
    return ended.status


if __name__ == "__main__":
    sys.exit(main())
