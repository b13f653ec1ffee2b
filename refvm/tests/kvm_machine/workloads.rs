//! The guest runs, verifies, and is stopped and run again.

use vmferry_refvm::kvm::Ring;
use vmferry_refvm::machine::{Machine, Workload};

use crate::support::{FIRST, PAGE, booted, config};

#[test]
fn each_workload_verifies_its_memory_on_1_2_and_4_vcpus() {
    for workload in [Workload::Random, Workload::Sequential, Workload::Hot] {
        for vcpus in [1, 2, 4] {
            let Some(mut guest) = booted(24, 2, config(vcpus, workload, 30), Ring::User) else { return };
            guest.run().unwrap();
            let report = guest.passes(2);
            guest.stop().unwrap();
            assert_eq!((report.wrong_bytes, report.machine_checks.len()), (0, 0), "{workload:?} {vcpus} {report:?}");
            assert!(report.writes > report.touches / 10 && report.writes < report.touches / 2, "{report:?}");
            assert!(report.first_touch_us.count > 0 && report.first_touch_us.max > 0.0, "{report:?}");
        }
    }
}

/// Names of this process's threads that belong to KVM, as Linux 6.14 and later have one for each VM.
fn threads_of_kvm() -> Vec<String> {
    let names = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    names.map(|task| name(task.unwrap())).filter(|name| name.starts_with("kvm-")).collect()
}

#[test]
fn kvm_makes_its_first_entry_parts_before_the_vm_runs() {
    let Some(mut guest) = booted(17, 1, config(2, Workload::Random, 50), Ring::User) else { return };
    let before = threads_of_kvm();
    guest.run().unwrap();
    guest.until("touches", |report| report.touches > 500);
    guest.stop().unwrap();
    assert_eq!(threads_of_kvm(), before);
}

#[test]
fn a_paced_workload_pauses_and_continues() {
    let Some(mut guest) = booted(17, 1, config(2, Workload::Paced, 50), Ring::User) else { return };
    guest.run().unwrap();
    let report = guest.until("touches", |report| report.touches > 500);
    assert_eq!(report.wrong_bytes, 0);
    guest.stop().unwrap();
}

#[test]
fn an_idle_guest_makes_one_pass_and_rests() {
    let Some(mut guest) = booted(24, 1, config(2, Workload::Idle, 10), Ring::User) else { return };
    guest.run().unwrap();
    let report = guest.until("one pass", |report| report.passes == 1);
    assert_eq!((report.touches, report.wrong_bytes), (8 << 20 >> 12, 0));
    for _ in 0..3 {
        guest.stop().unwrap();
        guest.run().unwrap();
    }
    assert_eq!(guest.report().touches, report.touches);
    assert_eq!(report.first_touch_us.count, report.touches);
}

#[test]
fn a_stopped_guest_does_nothing_and_continues_from_there() {
    let Some(mut guest) = booted(24, 1, config(4, Workload::Random, 50), Ring::User) else { return };
    for _ in 0..200 {
        guest.run().unwrap();
        guest.stop().unwrap();
        let before = guest.report();
        assert_eq!(guest.report(), before);
        guest.run().unwrap();
        guest.until("more touches", |report| report.touches > before.touches);
        guest.stop().unwrap();
    }
    assert_eq!(guest.report().wrong_bytes, 0);
}

#[test]
fn a_wrong_byte_is_found_and_counted_once() {
    let Some(mut guest) = booted(24, 2, config(2, Workload::Sequential, 20), Ring::User) else { return };
    guest.run().unwrap();
    guest.passes(1);
    guest.stop().unwrap();
    let last = guest.memory.regions().last().unwrap().spec;
    let last = last.gpa + last.size - PAGE;
    for gpa in [FIRST + 5 * PAGE, FIRST + 5 * PAGE + 8, last + 4095] {
        guest.flip_byte(gpa);
    }
    guest.run().unwrap();
    let report = guest.passes(2);
    let mut pages = report.wrong_pages.clone();
    pages.sort_unstable();
    assert_eq!((report.wrong_bytes, pages), (3, vec![FIRST + 5 * PAGE, last]));
}

#[test]
fn a_page_of_zeros_and_a_stale_page_are_found() {
    let Some(mut guest) = booted(24, 1, config(1, Workload::Sequential, 100), Ring::User) else { return };
    let (zeros, stale) = (guest.hva(FIRST + 7 * PAGE), guest.hva(FIRST + 9 * PAGE));
    let mut kept = [0u8; PAGE as usize];
    // SAFETY: a page of the guest, which is stopped; likewise below.
    unsafe { std::ptr::copy_nonoverlapping(stale as *const u8, kept.as_mut_ptr(), kept.len()) };
    guest.run().unwrap();
    guest.passes(1);
    guest.stop().unwrap();
    // SAFETY: as above.
    unsafe {
        std::ptr::write_bytes(zeros as *mut u8, 0, PAGE as usize);
        std::ptr::copy_nonoverlapping(kept.as_ptr(), stale as *mut u8, kept.len());
    }
    guest.run().unwrap();
    let report = guest.passes(1);
    assert_eq!(report.wrong_pages, [FIRST + 7 * PAGE, FIRST + 9 * PAGE]);
    assert!(report.wrong_bytes > 8000, "{report:?}");
}
