"""KVM: the probe makes a VM with one vCPU and enables machine checks. Source: Documentation/virt/kvm/api.rst."""

from __future__ import annotations

import errno
import os
import struct

from vmferry.cli.probe import libc
from vmferry.cli.probe.attempt import attempt
from vmferry.cli.probe.finding import Finding, ok, warn

KVM_DEVICE = "/dev/kvm"
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_CREATE_VCPU = 0xAE41
KVM_X86_GET_MCE_CAP_SUPPORTED = 0x8008AE9D
KVM_X86_SETUP_MCE = 0x4008AE9C
KVM_GET_MSRS = 0xC008AE88
MSR_IA32_MCG_CAP = 0x179
KVM_CAP_MCE = 31
KVM_CAP_MEMORY_FAULT_INFO = 232
API_VERSION = 12
BANKS = 10
MCG_SER_P = 1 << 24
"""Checks that the CPU tells action-required from action-optional errors (Intel SDM vol. 3B, 17.3.1.1)."""


def _open() -> int:
    return os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)


def try_kvm() -> str:
    kvm = _open()
    version = libc.ioctl(kvm, KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
    if version != API_VERSION:
        raise OSError(errno.EINVAL, f"KVM API version {version}, not {API_VERSION}")
    libc.ioctl(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM")
    return f"API version {version}, a VM can be made"


def try_machine_checks() -> str:
    """Checks that a vCPU accepts machine-check banks with software error recovery."""
    kvm = _open()
    banks = libc.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_MCE, "KVM_CAP_MCE")
    if banks < BANKS:
        raise OSError(errno.ENOTSUP, f"{banks} machine-check banks, {BANKS} are needed")
    supported = bytearray(8)
    libc.ioctl(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED, supported, "KVM_X86_GET_MCE_CAP_SUPPORTED")
    capability = struct.unpack("=Q", supported)[0]
    if not capability & MCG_SER_P:
        raise OSError(errno.ENOTSUP, f"MCG_CAP {capability:#x} lacks MCG_SER_P")
    vm = libc.ioctl(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM")
    vcpu = libc.ioctl(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU")
    wanted = bytearray(struct.pack("=Q", (capability & ~0xFF) | BANKS))
    libc.ioctl(vcpu, KVM_X86_SETUP_MCE, wanted, "KVM_X86_SETUP_MCE")
    shown = bytearray(struct.pack("=IIIIQ", 1, 0, MSR_IA32_MCG_CAP, 0, 0))
    libc.ioctl(vcpu, KVM_GET_MSRS, shown, "KVM_GET_MSRS")
    recovers = struct.unpack("=IIIIQ", shown)[-1] & MCG_SER_P
    note = "" if recovers else "; a guest sees no MCG_SER_P (SVM): a Linux guest needs a CPU model with SUCCOR"
    return f"MCG_CAP {capability:#x}, {banks} banks, set up on a vCPU{note}"


def try_memory_fault_exit() -> str:
    if libc.ioctl(_open(), KVM_CHECK_EXTENSION, KVM_CAP_MEMORY_FAULT_INFO, "KVM_CHECK_EXTENSION") < 1:
        raise OSError(errno.ENOTSUP, "KVM_CAP_MEMORY_FAULT_INFO is 0")
    return "KVM_EXIT_MEMORY_FAULT is there"


def check_kvm() -> Finding:
    found = attempt(try_kvm)
    if found.worked:
        return ok("kvm", found.seen)
    todo = "Load kvm_intel or kvm_amd and give access to /dev/kvm; without it the demo runs with --accel process."
    return warn("kvm", found.seen, todo)


def check_machine_checks() -> Finding:
    found = attempt(try_machine_checks)
    if found.worked:
        return ok("machine checks", found.seen)
    return warn("machine checks", found.seen, "KVM guests here cannot be told of memory errors; use another host.")


def check_memory_fault_exit() -> Finding:
    found = attempt(try_memory_fault_exit)
    if found.worked:
        return ok("memory-fault exit", found.seen)
    return warn(
        "memory-fault exit", found.seen, "Only guest_memfd needs it (Linux 6.8); SIGBUS tells of poison otherwise."
    )
