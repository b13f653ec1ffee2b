"""The kernel and an initramfs for it: a static program as process 1, and the modules that it loads."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNPACKED = Path(sys.prefix) / "cloud-kernel"
"""Where deploy/debian/cloud-kernel unpacks it."""
INIT = Path(__file__).with_name("init.c")
ADDRESS = "10.77.0.2"
MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"),
    *("failover", "net_failover", "virtio_net", "virtio_balloon", "virtio-rng"),
)


@dataclass(frozen=True, slots=True)
class LinuxImage:
    kernel: Path
    initramfs: Path


def why_not() -> str:
    """Why there is no such guest here; "" if there is one."""
    if not list(UNPACKED.glob("boot/vmlinuz-*")):
        return f"no kernel in {UNPACKED}: deploy/debian/cloud-kernel {UNPACKED} unpacks Debian's"
    return "" if shutil.which("gcc") else "gcc is missing: apt-get install gcc"


def build(directory: Path) -> LinuxImage:
    """Compiles and packs into the directory."""
    init = directory / "init"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", f'-DADDRESS="{ADDRESS}"']
    subprocess.run(["gcc", *flags, "-o", init, INIT], check=True)
    files = {"init": init.read_bytes(), "modules/names": "".join(f"{name}.ko\n" for name in MODULES).encode()}
    files |= {f"modules/{name}.ko": _module(name) for name in MODULES}
    initramfs = directory / "initramfs.gz"
    initramfs.write_bytes(gzip.compress(b"".join(_archive(files)), 1))
    return LinuxImage(next(UNPACKED.glob("boot/vmlinuz-*")), initramfs)


def _module(name: str) -> bytes:
    (found,) = UNPACKED.glob(f"lib/modules/*/kernel/**/{name}.ko")
    return found.read_bytes()


def _archive(files: dict[str, bytes]) -> Iterator[bytes]:
    """Entries of cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    folders = [*sorted({str(Path(name).parent) for name in files} - {"."}), "dev"]
    for number, name in enumerate(folders):
        yield _entry(name, stat.S_IFDIR | 0o755, b"", number)
    for number, (name, content) in enumerate(files.items(), len(folders)):
        yield _entry(name, stat.S_IFREG | 0o755, content, number)
    yield _entry("TRAILER!!!", 0, b"", 0)


def _entry(name: str, mode: int, content: bytes, number: int) -> bytes:
    fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
