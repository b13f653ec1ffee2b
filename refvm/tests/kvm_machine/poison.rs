//! Poisoned pages: exactly one machine check at the right address, whichever way KVM tells.

use std::os::unix::process::ExitStatusExt;

use vmferry_refvm::inject::Means;
use vmferry_refvm::kvm::Ring;
use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::machine::{Block, Machine, Workload};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::userfaultfd::{FEATURE_POISON, MODE_MISSING, PoisonOutcome, Userfaultfd};

use crate::support::{FIRST, Guest, PAGE, booted, checks, config, has_kvm, only_one, over, until};

#[test]
fn a_consumed_page_raises_one_machine_check_at_its_address() {
    for (vcpus, workload) in [(1, Workload::Sequential), (2, Workload::Random), (4, Workload::Sequential)] {
        let Some(mut guest) = booted(24, 1, config(vcpus, workload, 50), Ring::User) else { return };
        guest.run().unwrap();
        guest.until("touches", |report| report.touches > 100);
        guest.stop().unwrap();
        let bad: Vec<u64> = (0..32).map(|n| FIRST + (3 + n * 60) * PAGE).collect();
        bad.iter().for_each(|gpa| guest.poison(*gpa));
        guest.run().unwrap();
        guest.until("32 machine checks", |report| report.machine_checks.len() >= 32);
        let report = guest.passes(2);
        guest.stop().unwrap();
        let expected: Vec<_> = bad.iter().map(|gpa| (*gpa, "AR")).collect();
        assert_eq!(checks(&report), expected);
        assert_eq!((report.wrong_bytes, report.poisoned_touched), (0, 32));
        assert!(report.skips > 0);
        let mut announced = guest.announced();
        announced.sort_unstable();
        assert_eq!(announced, bad.iter().map(|gpa| (*gpa, true)).collect::<Vec<_>>());
    }
}

/// The kernel signals the thread that poisons a frame as well: that signal is no machine check.
#[test]
fn a_bad_frame_raises_one_machine_check_at_its_address() {
    if std::env::var_os("VMFERRY_TEST_HWPOISON").is_none() {
        return println!("SKIPPED: it takes frames of the host out of service; VMFERRY_TEST_HWPOISON=1 runs it");
    }
    for backing in [Backing::Anonymous, Backing::Memfd] {
        if !has_kvm() {
            return;
        }
        let _turn = only_one();
        let memory = GuestMemory::new(&split(32 << 20, 1, backing).unwrap()).unwrap();
        let mut guest = over(memory, config(2, Workload::Sequential, 50), Ring::User);
        guest.boot().unwrap();
        let bad: Vec<u64> = (0..4).map(|n| FIRST + (3 + n * 600) * PAGE).collect();
        bad.iter().for_each(|gpa| guest.make_bad(*gpa, Means::Frame));
        guest.run().unwrap();
        guest.until("4 machine checks", |report| report.machine_checks.len() >= 4);
        let report = guest.passes(1);
        assert_eq!(checks(&report), bad.iter().map(|gpa| (*gpa, "AR")).collect::<Vec<_>>());
        assert_eq!((report.wrong_bytes, report.poisoned_touched), (0, 4));
    }
}

#[test]
fn the_vcpu_that_owns_the_page_takes_the_machine_check() {
    let Some(mut guest) = booted(24, 1, config(2, Workload::Sequential, 0), Ring::User) else { return };
    let (low, high) = (FIRST + 10 * PAGE, FIRST + 1034 * PAGE);
    guest.poison(low);
    guest.poison(high);
    guest.run().unwrap();
    let report = guest.until("2 machine checks", |report| report.machine_checks.len() >= 2);
    let mut takers: Vec<_> = report.machine_checks.iter().map(|check| (check.gpa, check.vcpu)).collect();
    takers.sort_unstable();
    assert_eq!(takers, [(low, 0), (high, 1)]);
}

/// Where ring 0 is emulated the access exits as MMIO; elsewhere as SIGBUS. One machine check in either case.
#[test]
fn an_access_that_kvm_emulates_raises_one_machine_check() {
    let Some(mut guest) = booted(17, 1, config(1, Workload::Sequential, 100), Ring::Kernel) else { return };
    let bad = [FIRST + 2 * PAGE, FIRST + 3 * PAGE, FIRST + 20 * PAGE];
    bad.iter().for_each(|gpa| guest.poison(*gpa));
    guest.run().unwrap();
    guest.until("touches behind the last bad page", |report| report.touches > 40);
    guest.stop().unwrap();
    let report = guest.report();
    assert_eq!(checks(&report), bad.map(|gpa| (gpa, "AR")));
    // It may stand between a touch and its write.
    assert!(report.wrong_bytes == 0 && report.touches - report.writes <= 1, "{report:?}");
    assert_eq!(guest.announced(), bad.map(|gpa| (gpa, true)));
}

#[test]
fn a_page_found_bad_is_told_once_and_not_touched_again() {
    for vcpus in [1, 2, 4] {
        let Some(mut guest) = booted(24, 1, config(vcpus, Workload::Sequential, 50), Ring::User) else { return };
        let (told_standing, told_running) = (FIRST + 11 * PAGE, FIRST + 1500 * PAGE);
        guest.inject_action_optional(Block::page(told_standing)).unwrap();
        guest.poison(told_standing);
        guest.run().unwrap();
        guest.inject_action_optional(Block::page(told_running + 123)).unwrap();
        guest.until("2 machine checks", |report| report.machine_checks.len() >= 2);
        guest.stop().unwrap();
        guest.poison(told_running);
        guest.run().unwrap();
        for gpa in [told_standing, told_running] {
            guest.inject_action_optional(Block::page(gpa)).unwrap();
        }
        let report = guest.passes(2);
        assert_eq!(checks(&report), [(told_standing, "AO"), (told_running, "AO")]);
        assert_eq!(report.wrong_bytes, 0);
        guest.stop().unwrap();
        assert_eq!(guest.announced(), [(told_standing, false), (told_running, false)]);
    }
}

#[test]
fn many_pages_found_bad_in_a_row_are_all_told() {
    let Some(mut guest) = booted(24, 1, config(4, Workload::Random, 50), Ring::User) else { return };
    let bad: Vec<u64> = (0..64).map(|n| FIRST + n * 30 * PAGE).collect();
    guest.run().unwrap();
    for gpa in &bad {
        guest.inject_action_optional(Block::page(*gpa)).unwrap();
    }
    guest.until("64 machine checks", |report| report.machine_checks.len() >= 64);
    let report = guest.passes(1);
    assert_eq!(checks(&report), bad.iter().map(|gpa| (*gpa, "AO")).collect::<Vec<_>>());
}

/// Stopped at any instruction of the handler, as often as possible.
#[test]
fn a_machine_check_in_progress_survives_being_stopped() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Sequential, 0), Ring::User) else { return };
    let bad: Vec<u64> = (0..500).map(|n| FIRST + n * 2 * PAGE).collect();
    bad.iter().for_each(|gpa| guest.poison(*gpa));
    for _ in 0..5000 {
        guest.run().unwrap();
        guest.stop().unwrap();
    }
    guest.run().unwrap();
    let report = guest.passes(1);
    assert_eq!(checks(&report), bad.iter().map(|gpa| (*gpa, "AR")).collect::<Vec<_>>());
    assert_eq!(report.wrong_bytes, 0);
}

/// More than the handler's stack would hold if they interrupted each other.
#[test]
fn a_row_of_machine_checks_is_taken_one_by_one() {
    for workload in [Workload::Random, Workload::Idle] {
        let Some(mut guest) = booted(17, 1, config(2, workload, 50), Ring::User) else { return };
        let bad: Vec<u64> = (0..200).map(|n| FIRST + n * PAGE).collect();
        for gpa in &bad {
            guest.inject_action_optional(Block::page(*gpa)).unwrap();
        }
        guest.run().unwrap();
        let report = guest.until("200 machine checks", |report| report.machine_checks.len() >= 200);
        assert_eq!(checks(&report), bad.iter().map(|gpa| (*gpa, "AO")).collect::<Vec<_>>());
        assert_eq!(report.wrong_bytes, 0);
    }
}

/// A guest that pauses stands in a handler: the machine check then returns to ring 0.
#[test]
fn a_resting_guest_is_told_in_the_middle_of_its_pause() {
    for workload in [Workload::Idle, Workload::Paced] {
        let Some(mut guest) = booted(17, 1, config(2, workload, 50), Ring::User) else { return };
        guest.run().unwrap();
        guest.until("a pass or some touches", |report| report.passes > 0 || report.touches > 20);
        let bad: Vec<u64> = (0..20).map(|n| FIRST + n * 9 * PAGE).collect();
        for (known, gpa) in bad.iter().enumerate() {
            guest.inject_action_optional(Block::page(*gpa)).unwrap();
            guest.until("the machine check", |report| report.machine_checks.len() > known);
        }
        assert_eq!(checks(&guest.report()), bad.iter().map(|gpa| (*gpa, "AO")).collect::<Vec<_>>());
        guest.stop().unwrap();
        guest.save().unwrap();
    }
}

/// The page is poison and the guest runs over it while it is told: whichever comes first, it is one machine check.
#[test]
fn consumed_and_found_at_once_is_one_machine_check() {
    let Some(mut guest) = booted(18, 1, config(2, Workload::Random, 50), Ring::User) else { return };
    let bad: Vec<u64> = (0..100).map(|n| FIRST + n * 5 * PAGE).collect();
    guest.run().unwrap();
    for gpa in &bad {
        guest.stop().unwrap();
        guest.poison(*gpa);
        guest.run().unwrap();
        guest.inject_action_optional(Block::page(*gpa)).unwrap();
    }
    guest.until("100 machine checks", |report| report.machine_checks.len() >= 100);
    let report = guest.passes(3);
    let found: Vec<u64> = checks(&report).into_iter().map(|(gpa, _)| gpa).collect();
    assert_eq!(found, bad);
    assert_eq!(report.wrong_bytes, 0);
    guest.stop().unwrap();
    let mut announced: Vec<u64> = guest.announced().into_iter().map(|(gpa, _)| gpa).collect();
    announced.sort_unstable();
    assert_eq!(announced, bad);
}

/// A page that is registered and missing, as on the destination of a migration.
fn take_away(guest: &Guest, gpa: u64) -> Userfaultfd {
    let uffd = Userfaultfd::new(FEATURE_POISON).unwrap();
    let hva = guest.hva(gpa);
    uffd.register(hva, PAGE, MODE_MISSING).unwrap();
    // SAFETY: a page of the guest, which is stopped.
    assert_eq!(unsafe { libc::madvise(hva as *mut libc::c_void, PAGE as usize, libc::MADV_DONTNEED) }, 0);
    uffd
}

fn wait_for_fault(uffd: &Userfaultfd) {
    until("a fault", || {
        let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        (unsafe { libc::poll(&mut poll, 1, 0) } == 1).then_some(())
    });
}

#[test]
fn a_vcpu_that_waits_on_a_fault_can_be_stopped_and_then_finds_the_poison() {
    let Some(mut guest) = booted(18, 1, config(1, Workload::Sequential, 0), Ring::User) else { return };
    let gpa = FIRST + 100 * PAGE;
    let uffd = take_away(&guest, gpa);
    guest.run().unwrap();
    wait_for_fault(&uffd);
    let before = guest.report();
    assert_eq!(before.touches, 100);
    // Nobody answers the fault: the source is gone.
    for _ in 0..5 {
        guest.stop().unwrap();
        guest.save().unwrap();
        guest.run().unwrap();
    }
    assert_eq!(guest.report().touches, 100);
    assert_eq!(uffd.poison(guest.hva(gpa), PAGE).unwrap(), PoisonOutcome::Marked);
    let report = guest.passes(1);
    assert_eq!(checks(&report), [(gpa, "AR")]);
    assert_eq!(report.wrong_bytes, 0);
}

#[test]
fn a_vcpu_that_waits_on_a_fault_can_get_the_machine_check_of_its_page() {
    let Some(mut guest) = booted(18, 1, config(2, Workload::Sequential, 0), Ring::User) else { return };
    let gpa = FIRST + 100 * PAGE;
    let uffd = take_away(&guest, gpa);
    guest.run().unwrap();
    wait_for_fault(&uffd);
    guest.inject_action_optional(Block::page(gpa)).unwrap();
    let report = guest.passes(1);
    assert_eq!(checks(&report), [(gpa, "AO")]);
    assert_eq!((report.wrong_bytes, report.skips > 0), (0, true));
}

/// The host's own access to a poisoned page is no machine check of the guest: it ends the process, and says where.
#[test]
fn a_sigbus_of_the_host_itself_ends_the_process() {
    const CHILD: &str = "VMFERRY_TEST_TOUCH_POISON";
    if std::env::var_os(CHILD).is_some() {
        let Some(guest) = booted(18, 1, config(1, Workload::Idle, 0), Ring::User) else { return };
        guest.poison(FIRST);
        guest.flip_byte(FIRST);
        return;
    }
    if !has_kvm() {
        return;
    }
    let test = "poison::a_sigbus_of_the_host_itself_ends_the_process";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
    assert!(String::from_utf8_lossy(&child.stderr).contains("SIGBUS outside the guest's accesses, at 0x"), "{child:?}");
}
