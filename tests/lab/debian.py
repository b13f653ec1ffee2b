"""Kernels, their modules and an emulator from Debian's packages, unpacked under `target/lab`. Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "target/lab"
MIRROR = "http://deb.debian.org"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = (
    *(("debian", suite) for suite in ("bookworm", "bookworm-backports", "trixie", "trixie-backports")),
    *(("debian-security", suite) for suite in ("bookworm-security", "trixie-security")),
)
SAFE_EMULATOR = [8, 2]
"""The multi-threaded TCG of an older QEMU may run code that the kernel has patched as it was before the patch."""
LISTS_HOLD_S = 24 * 3600


class LackingError(Exception):
    """The lab cannot run here; says why."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """`where` has lib/modules."""

    release: str
    image: Path
    where: Path


def say(text: str) -> None:
    print(f"lab: {text}", flush=True)  # noqa: T201


def _run(words: Sequence[str | Path], folder: Path | None = None) -> str:
    try:
        environment = dict(os.environ, APT_CONFIG=str(CACHE / "apt/apt.conf"))
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LackingError(f"{words[0]} is missing: the lab takes its kernels from Debian's packages") from error
    if done.returncode != 0:
        raise LackingError(f"{' '.join(map(str, words))}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


@cache
def refresh_lists() -> None:
    """Brings apt's lists, in a state of the lab's own.

    Raises: LackingError.
    """
    root = CACHE / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (root / name).mkdir(parents=True, exist_ok=True)
    lines = [f"deb [signed-by={KEYRING}] {MIRROR}/{archive} {suite} main\n" for archive, suite in SUITES]
    (root / "sources.list").write_text("".join(lines))
    (root / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{root}/sources.list";\nDir::Etc::sourceparts "/nonexistent";\n'
        f'Dir::State::lists "{root}/lists";\nDir::Cache "{root}/cache";\n'
        'Acquire::Languages "none";\nAPT::Sandbox::User "root";\n'
    )
    stamp = root / "updated"
    if not stamp.exists() or time.time() > stamp.stat().st_mtime + LISTS_HOLD_S:
        say("apt-get update")
        _run(["apt-get", "update", "-qq"])
        stamp.touch()


def matching(pattern: str) -> list[str]:
    """Names of packages."""
    refresh_lists()
    return [line.split(" - ")[0] for line in _run(["apt-cache", "search", "--names-only", pattern]).splitlines()]


def unpack(packages: Sequence[str], where: Path) -> None:
    refresh_lists()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        _run(["apt-get", "download", "-qq", *packages], Path(folder))
        for archive in Path(folder).glob("*.deb"):
            _run(["dpkg", "-x", archive, where])


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def tools() -> Path:
    """A folder with kmod under its several names; the machine may have none."""
    where = CACHE / "tools"
    if not (where / "kmod").exists():
        with tempfile.TemporaryDirectory(dir=_made(CACHE)) as folder:
            # A later Debian's wants later libraries.
            unpack(["kmod/bookworm"], Path(folder))
            _made(where)
            for name in ("depmod", "modprobe", "lsmod", "rmmod"):
                (where / name).unlink(missing_ok=True)
                (where / name).symlink_to("kmod")
            (found,) = Path(folder).glob("**/bin/kmod")
            shutil.copy(found, where / "kmod")
    return where


def kernel(version: str) -> Kernel:
    """Debian's newest kernel for virtual machines of that version: its file systems and virtio are built in.

    Raises: LackingError.
    """
    where = CACHE / "kernels" / version
    if not (where / ".done").exists():
        pattern = rf"^linux-image-{re.escape(version)}[0-9.]*[+]deb1[0-9.]+-cloud-amd64$"
        names = matching(pattern)
        if not names:
            raise LackingError(f"no package of {', '.join(suite for _, suite in SUITES)} matches {pattern}")
        release = max(names, key=numbers).removeprefix("linux-image-")
        say(f"unpacks Linux {release}")
        shutil.rmtree(where, ignore_errors=True)
        _made(where)
        # From 6.19 on the image's package is empty and depends on these.
        split = matching(f"^linux-(binary|modules|base)-{re.escape(release)}$")
        unpack(split or [f"linux-image-{release}"], where)
        if not (where / "lib").exists():
            (where / "lib").symlink_to("usr/lib")
        _run([tools() / "depmod", "-b", where, release])
        (where / ".done").touch()
    (release,) = (entry.name for entry in (where / "lib/modules").iterdir())
    images = (where / f"boot/vmlinuz-{release}", where / f"lib/modules/{release}/vmlinuz")
    return Kernel(release, next(image for image in images if image.exists()), where)


def emulator() -> list[str]:
    """QEMU: the machine's own if it is safe, else that of bookworm-backports, which needs the libraries of bookworm's.

    Raises: LackingError.
    """
    own = shutil.which("qemu-system-x86_64")
    if own is None:
        raise LackingError("qemu-system-x86_64 is missing: apt-get install qemu-system-x86")
    if numbers(_run([own, "--version"]))[:2] >= SAFE_EMULATOR:
        return [own]
    where = CACHE / "qemu"
    if not (where / ".done").exists():
        refresh_lists()
        listed = _run(["apt-cache", "madison", "qemu-system-x86"])
        versions = [line.split("|")[1].strip() for line in listed.splitlines() if "~bpo12" in line]
        if not versions:
            raise LackingError("bookworm-backports has no qemu-system-x86")
        say(f"unpacks QEMU {versions[0]}")
        unpack([f"qemu-system-{part}={versions[0]}" for part in ("x86", "common", "data")], where)
        (where / ".done").touch()
    folders = (where / "usr/share/qemu", "/usr/share/seabios")
    return [str(where / "usr/bin/qemu-system-x86_64"), *(word for folder in folders for word in ("-L", str(folder)))]


def file_server() -> str:
    """The program that shows this machine's files to the guest.

    Raises: LackingError.
    """
    known = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
    found = next((path for path in known if Path(path).exists()), shutil.which("virtiofsd"))
    if found is None:
        raise LackingError("virtiofsd is missing: apt-get install virtiofsd (Debian 12: qemu-system-common)")
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
