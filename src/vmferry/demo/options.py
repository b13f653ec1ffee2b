"""The options of the demo."""

from __future__ import annotations

import argparse
import fcntl
import re
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import Reason, VmferryError
from vmferry.units import GIB, KIB, MIB, PAGE_1G, PAGE_2M, PAGE_4K

WORKLOADS = ("idle", "random", "sequential", "hot", "paced")
ACCELERATORS = ("auto", "kvm", "process")
BACKINGS = ("anonymous", "memfd")
PAGE_SIZES = {"4K": PAGE_4K, "2M": PAGE_2M, "1G": PAGE_1G}
HUGE = {PAGE_2M, PAGE_1G}
PAYLOAD_BYTES = 16 * MIB
"""The start of guest memory holds the reference VMM's payload. No page of it is poisoned."""
SMALLEST = 32 * MIB
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12
TIME_LIMIT_S = 180.0
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB}


@dataclass(frozen=True, slots=True)
class GuestShape:
    """The shape of a guest: the options of its `vmferry-refvm`. Sizes are bytes."""

    memory: int = 512 * MIB
    vcpus: int = 2
    backing: str = "anonymous"
    workload: str = "random"
    write_percent: int = 30
    seed: int = 1
    page_size: int = PAGE_4K


@dataclass(frozen=True, slots=True)
class WaitingShape:
    """The memory that a waiting `vmferry-refvm` makes. None: the same as on the source."""

    backing: str | None = None
    page_size: int | None = None


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The demo's options. `poison_before` pages are bad before the migration, `poison_during` turn bad during postcopy.

    `real_frames`: frames of the host go bad, and are then out of service until it boots again.
    `qemu`: this program runs the guest, "" the newest QEMU here; None: the reference VMM does.
    """

    shape: GuestShape
    waiting: WaitingShape
    accel: str
    qemu: str | None
    poison_before: int
    poison_during: int
    real_frames: bool
    time_limit_s: float
    keep: bool
    tls: bool = False


def memory_size(text: str) -> int:
    """The bytes of "512M": a multiple of 4 KiB."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < SMALLEST or size % PAGE_4K:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least {SMALLEST // MIB}M")
    return size


def poison_counts(text: str) -> tuple[int, int]:
    """Reads "BEFORE" or "BEFORE,DURING"."""
    match = re.fullmatch(r"(\d+)(?:,(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not BEFORE[,DURING]")
    return int(match[1]), int(match[2] or 0)


def percent(text: str) -> int:
    if not text.isdecimal() or int(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage")
    return int(text)


def vcpu_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 16")
    return int(text)


def page_size(text: str) -> int:
    """The bytes of "2M"."""
    if text not in PAGE_SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(PAGE_SIZES)}")
    return PAGE_SIZES[text]


def add_options(parser: argparse.ArgumentParser) -> None:
    shape = GuestShape()
    parser.add_argument(
        "--qemu",
        nargs="?",
        const="",
        metavar="PROGRAM",
        help="move an unmodified QEMU, not the reference VMM (the newest one here)",
    )
    parser.add_argument("--memory", type=memory_size, default=shape.memory, metavar="SIZE", help="of the guest (512M)")
    parser.add_argument("--vcpus", type=vcpu_count, default=shape.vcpus, metavar="N", help="of the guest (2)")
    parser.add_argument(
        "--poison",
        type=poison_counts,
        metavar="BEFORE[,DURING]",
        help="pages that are bad before, and that turn bad during postcopy (64,16; with --qemu 64)",
    )
    parser.add_argument(
        "--real-frames",
        action="store_true",
        help="poison frames of this host, which takes them out of service until it boots again (root, and a kernel with"
        " CONFIG_MEMORY_FAILURE); without it a poison marker stands for each bad page",
    )
    parser.add_argument("--workload", choices=WORKLOADS, default=shape.workload, help="what the guest does (random)")
    parser.add_argument(
        "--write-percent", type=percent, default=shape.write_percent, metavar="P", help="touches that rewrite (30)"
    )
    parser.add_argument("--accel", choices=ACCELERATORS, default="auto", help="kvm where there is one (auto)")
    parser.add_argument("--backing", choices=BACKINGS, default=shape.backing, help="of guest memory (anonymous)")
    parser.add_argument(
        "--page-size", type=page_size, default=shape.page_size, metavar="SIZE", help="of guest memory: 4K, 2M, 1G (4K)"
    )
    parser.add_argument(
        "--destination-backing", choices=BACKINGS, help="of guest memory on the destination (as on the source)"
    )
    parser.add_argument(
        "--destination-page-size",
        type=page_size,
        metavar="SIZE",
        help="of guest memory on the destination (as on the source)",
    )
    parser.add_argument(
        "--seed", type=int, default=shape.seed, metavar="N", help="of the guest and of the bad pages (1)"
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of the whole demo (180)")
    parser.add_argument("--tls", action="store_true", help="with certificates that the demo makes, and TLS everywhere")
    parser.add_argument("--keep", action="store_true", help="keep logs and databases")


def from_arguments(args: argparse.Namespace) -> DemoOptions:
    from vmferry.demo.patience import patient  # It refuses a wrong environment, and no other verb depends on that.

    before, during = args.poison or (64, 16 if args.qemu is None else 0)
    huge = {args.page_size, args.destination_page_size} & HUGE
    if args.qemu is not None and (args.accel == "process" or args.real_frames or huge or during):
        raise VmferryError(
            Reason.INVALID_ARGUMENT,
            "--qemu goes with none of --accel process, --real-frames, pages of 2M or 1G, and --poison BEFORE,DURING.",
            "Leave them out.",
        )
    shape = GuestShape(
        args.memory, args.vcpus, args.backing, args.workload, args.write_percent, args.seed, args.page_size
    )
    time_limit_s = patient(TIME_LIMIT_S) if args.time_limit is None else args.time_limit
    waiting = WaitingShape(args.destination_backing, args.destination_page_size)
    return DemoOptions(
        shape=shape,
        waiting=waiting,
        accel=args.accel,
        qemu=args.qemu,
        poison_before=before,
        poison_during=during,
        real_frames=args.real_frames,
        time_limit_s=time_limit_s,
        keep=args.keep,
        tls=args.tls,
    )


def choose_accel(asked: str, device: Path = Path("/dev/kvm")) -> tuple[str, str]:
    """The accelerator, and words for the operator if it is not the preferred one."""
    if asked == "process":
        return "process", ""
    why = why_not_kvm(device)
    if not why:
        return "kvm", ""
    return "process", f"No usable {device} ({why}): the guest runs as threads of a process (--accel process)."


def why_not_kvm(device: Path) -> str:
    """Asks KVM for its API version (Documentation/virt/kvm/api.rst, 4.1). Returns "", or why it is not 12."""
    try:
        with device.open("rb+", buffering=0) as kvm:
            version = fcntl.ioctl(kvm, KVM_GET_API_VERSION)
    except OSError as error:
        return error.strerror or str(error)
    return "" if version == KVM_API_VERSION else f"API version {version}"
