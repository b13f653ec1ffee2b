//! The guest, if a VMM announces the move by the clock page and not by the epoch: on KVM, in our own VMM. The test plays
//! the other VMM.

#![allow(clippy::unwrap_used)]

use std::mem::offset_of;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use vmferry_patience::patient;
use vmferry_refvm::guest::VCPU_BLOCKS_GPA;
use vmferry_refvm::guest::report::VcpuBlock;
use vmferry_refvm::kvm::{KvmMachine, Ring};
use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::machine::{GuestConfig, Machine, Workload};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::report_reader;

const CLOCK_GPA: u64 = 0x8000;
/// `flags` of `struct pvclock_vcpu_time_info`, and `PVCLOCK_GUEST_STOPPED` in it.
const FLAGS: u64 = CLOCK_GPA + 29;
const STOPPED: u8 = 1 << 1;
const OTHER: u8 = 1;

#[test]
fn the_clock_pages_flag_begins_the_histogram_anew_and_is_taken_back() {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        println!("SKIPPED: /dev/kvm: {error}");
        return;
    }
    let memory = GuestMemory::new(&split(48 << 20, 1, Backing::Anonymous).unwrap()).unwrap();
    let base = memory.regions()[0].hva;
    let config = GuestConfig { vcpus: 1, workload: Workload::Sequential, write_percent: 20, seed: 3 };
    let (errors, _inbox) = channel();
    let mut machine = KvmMachine::new(memory.mapped(), config, errors, Ring::User).unwrap();
    machine.boot().unwrap();
    let block = base + VCPU_BLOCKS_GPA;
    // SAFETY: in the kernel area, aligned, and the guest does not run yet.
    unsafe { ((block + offset_of!(VcpuBlock, clock_gpa) as u64) as *mut u64).write_volatile(CLOCK_GPA) };
    let report = || report_reader::read_newest(&memory.mapped()[0]).unwrap();
    // SAFETY: a word of the block, aligned.
    let epoch = || unsafe { ((block + offset_of!(VcpuBlock, epoch) as u64) as *const u64).read_volatile() };
    let pages = ((48 << 20) - (16 << 20)) / 4096;

    machine.run().unwrap();
    until(|| report().first_touch_us.count == pages);
    assert_eq!((epoch(), report().blackout_us), (1, 0.0));
    machine.stop().unwrap();
    // SAFETY: a byte of the kernel area, and the guest is stopped.
    unsafe { ((base + FLAGS) as *mut u8).write_volatile(STOPPED | OTHER) };
    machine.run().unwrap();
    until(|| epoch() == 2);
    // All pages are first touched once more, and no more often.
    let passes = report().passes;
    until(|| report().passes > passes + 2);
    machine.stop().unwrap();
    assert_eq!(report().first_touch_us.count, pages);
    assert_eq!(epoch(), 2);
    assert!(report().blackout_us > 0.0);
    assert_eq!(report().wrong_bytes, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { ((base + FLAGS) as *const u8).read_volatile() }, OTHER);
}

fn until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + patient(60.0);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}
