//! Memory errors of huge pages: one machine check for all that is lost, named by the least significant bit of its address.

use vmferry_refvm::kvm::Ring;
use vmferry_refvm::layout::{Backing, MadeOf, split};
use vmferry_refvm::machine::{Block, Machine, Ram, Workload};
use vmferry_refvm::memory::GuestMemory;

use crate::huge_pages::reserve;
use crate::support::{FIRST, Guest, PAGE, booted, checks, config, has_kvm, memory, only_one, over, over_ram};

const HUGE: u64 = 2 << 20;
const LSB_2M: u32 = 21;

fn huge(gpa: u64) -> Block {
    Block::around(gpa, LSB_2M)
}

/// Every touch of a page in the block is left out, and no other. The guest goes through its memory page by page and
/// rewrites all that it touches.
fn keeps_off(guest: &Guest, block: Block) {
    // A touch may be under way.
    guest.passes(1);
    let pages: Vec<u64> = (FIRST..guest.memory.regions()[0].spec.size).step_by(PAGE as usize).collect();
    let generations = || pages.iter().map(|gpa| guest.generation(*gpa)).collect::<Vec<_>>();
    let before = generations();
    let report = guest.passes(2);
    assert_eq!(report.wrong_bytes, 0, "{report:?}");
    for ((gpa, before), after) in pages.iter().zip(before).zip(generations()) {
        assert_eq!(after == before, block.covers(Block::page(*gpa)), "{gpa:#x}: {before}, then {after}");
    }
}

#[test]
fn a_huge_page_found_bad_is_one_machine_check_and_none_of_it_is_touched() {
    for vcpus in [1, 2] {
        let Some(mut guest) = booted(24, 1, config(vcpus, Workload::Sequential, 100), Ring::User) else { return };
        let bad = huge(FIRST + 2 * HUGE);
        guest.run().unwrap();
        guest.inject_action_optional(Block::page(bad.gpa + 5 * PAGE)).unwrap();
        guest.until("the machine check of a page", |report| report.machine_checks.len() == 1);
        guest.inject_action_optional(bad).unwrap();
        guest.until("the machine check of the block", |report| report.machine_checks.len() >= 2);
        // All of it is known: nothing is told again.
        guest.inject_action_optional(Block::page(bad.gpa + 9 * PAGE)).unwrap();
        keeps_off(&guest, bad);
        let report = guest.report();
        assert_eq!(checks(&report), [(bad.gpa, "AO"), (bad.gpa + 5 * PAGE, "AO")]);
        let lsbs: Vec<u32> = report.machine_checks.iter().map(|check| check.lsb).collect();
        assert_eq!(lsbs, [12, LSB_2M]);
        guest.stop().unwrap();
        assert_eq!(guest.announced(), [(bad.gpa + 5 * PAGE, false), (bad.gpa, false)]);
    }
}

/// The vCPU stumbles over 4 KiB; what it is told is the page of the backing around it.
#[test]
fn a_consumed_page_takes_the_rest_of_its_huge_page_along() {
    if !has_kvm() {
        return;
    }
    let _turn = only_one();
    let memory = memory(24, 1);
    let ram = Ram { page_sizes: [HUGE].into(), ..memory.ram() };
    let mut guest = over_ram(memory, ram, config(1, Workload::Sequential, 100), Ring::User);
    guest.boot().unwrap();
    let bad = huge(FIRST + HUGE);
    guest.poison(bad.gpa + 7 * PAGE);
    guest.run().unwrap();
    guest.until("the machine check", |report| !report.machine_checks.is_empty());
    keeps_off(&guest, bad);
    let report = guest.report();
    assert_eq!((checks(&report), report.machine_checks[0].lsb), (vec![(bad.gpa, "AR")], LSB_2M));
    guest.stop().unwrap();
    assert_eq!(guest.announced(), [(bad.gpa, true)]);
}

#[test]
fn a_guest_on_huge_pages_runs_and_loses_one_as_a_whole() {
    if !has_kvm() {
        return;
    }
    let _turn = only_one();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let Some(_reserved) = reserve(16) else { return };
        let specs = split(32 << 20, 1, MadeOf { backing, page_size: HUGE }).unwrap();
        let mut guest = over(GuestMemory::new(&specs).unwrap(), config(2, Workload::Random, 50), Ring::User);
        guest.boot().unwrap();
        guest.run().unwrap();
        guest.until("touches", |report| report.touches > 1000);
        guest.stop().unwrap();
        let bad = huge(FIRST + 3 * HUGE);
        guest.poison(bad.gpa + 3 * PAGE);
        guest.poison(bad.gpa);
        guest.run().unwrap();
        let report = guest.passes(2);
        guest.stop().unwrap();
        assert_eq!(report.wrong_bytes, 0, "{report:?}");
        // A vCPU that was in the middle of a touch when another was told is told too.
        let found = checks(&report);
        assert!((1..=2).contains(&found.len()) && found.iter().all(|check| *check == (bad.gpa, "AR")), "{found:?}");
        assert!(report.machine_checks.iter().all(|check| check.lsb == LSB_2M));
    }
}
