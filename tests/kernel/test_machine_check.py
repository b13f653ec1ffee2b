"""How KVM tells of a poisoned page and of a missing one, and how a machine check gets into a guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("uffd_poison", "kvm")

BAD = "0x40000"
both = pytest.mark.parametrize("backing", ["anon", "shmem"])


@both
def test_ring_3_touch_of_a_marker_is_sigbus_in_the_vcpu_thread(ask: Any, backing: str) -> None:
    assert ask("machine_check", "ring-3-touch", backing) == {
        "told": "sigbus",
        "run": "EINTR",
        "code": "BUS_MCEERR_AR",
        "lsb": "12",
        "gpa": BAD,
        "in_vcpu_thread": "1",
    }


@both
def test_ring_3_touch_of_a_bad_frame_is_sigbus_in_the_vcpu_thread(ask: Any, backing: str, real_frames: None) -> None:
    assert ask("machine_check", "ring-3-touch-of-a-frame", backing) == {
        "told": "sigbus",
        "run": "EINTR",
        "code": "BUS_MCEERR_AR",
        "lsb": "12",
        "gpa": BAD,
        "in_vcpu_thread": "1",
    }


@both
def test_emulated_touch_of_a_marker_is_told_in_one_of_three_ways(ask: Any, backing: str) -> None:
    """Where KVM emulates real mode it is an MMIO exit inside RAM; where the processor runs it, as in ring 3."""
    answers = ask("machine_check", "real-mode-touch", backing)
    assert answers["told"] in {"mmio", "sigbus", "memory_fault"}
    assert answers["gpa"] == BAD


@both
def test_emulated_touch_of_a_bad_frame_is_told_as_that_of_a_marker(ask: Any, backing: str, real_frames: None) -> None:
    frame, marker = (ask("machine_check", case, backing) for case in ("real-mode-touch-of-a-frame", "real-mode-touch"))
    assert (frame["told"], frame["gpa"]) == (marker["told"], BAD)


@both
def test_guest_touch_of_a_missing_page_is_a_fault_of_the_vcpu_thread(ask: Any, backing: str) -> None:
    answers = ask("machine_check", "missing-page", backing)
    assert answers == {"gpa": BAD, "same_thread": "1", "guest_read": "0x707"}


@both
def test_injected_machine_check_reaches_vector_18_with_its_address(ask: Any, backing: str) -> None:
    answers = ask("machine_check", "injected", backing)
    assert answers == {"set": "0", "exit": "hlt", "address_in_guest": BAD}


@both
def test_machine_check_without_cr4_mce_shuts_the_guest_down(ask: Any, backing: str) -> None:
    answers = ask("machine_check", "injected-without-cr4-mce", backing)
    assert (answers["set"], answers["exit"]) == ("0", "shutdown")


def test_svm_shows_a_guest_no_recovery_bit(ask: Any) -> None:
    """KVM takes MCG_SER_P and keeps it from the guest there (svm_setup_mce in arch/x86/kvm/svm/svm.c)."""
    shown = "0x10a" if Path("/sys/module/kvm_amd").exists() else "0x100010a"
    assert ask("machine_check", "capabilities", "anon") == {"setup": "0", "mcg_cap": shown}
