use std::collections::BTreeMap;

use super::*;

#[test]
fn addresses_are_found_by_small_large_and_huge_pages() {
    let entry = |gpa: u64, flags: u64| gpa | flags | PRESENT;
    let words = BTreeMap::from([
        (0x1000, entry(0x2000, 0)),          // level 4, entry 0
        (0x2000, entry(0x3000, 0)),          // level 3: the first GiB
        (0x2008, entry(0x4000_0000, LARGE)), // the second: one page
        (0x3000, entry(0x4000, 0)),          // level 2: the first 2 MiB
        (0x3008, entry(0x0060_0000, LARGE)), // the next: one page
        (0x4018, entry(0x9000, 1 << 63)),    // level 1: the fourth page, not executable
    ]);
    let found = |linear| walk(0x1000, 4, linear, &mut |gpa| words.get(&gpa).copied());
    assert_eq!(found(0x3123), Some(0x9123));
    assert_eq!(found(0x20_0000 + 0x1_2345), Some(0x61_2345));
    assert_eq!(found(0x4000_0000 + 0x123_4567), Some(0x4123_4567));
    assert_eq!((found(0x5000), found(1 << 40), found(u64::MAX)), (None, None, None));
    let five = BTreeMap::from([(0x8000, entry(0x1000, 0))]);
    assert_eq!(walk(0x8000, 5, 0x3123, &mut |gpa| five.get(&gpa).or(words.get(&gpa)).copied()), Some(0x9123));
}

#[test]
fn code_and_targets_of_registers_are_touched_and_unreadable_ones_skipped() {
    // One page of 2 MiB at 0.
    let words = BTreeMap::from([(0x1000, 0x2001), (0x2000, 0x3001), (0x3000, LARGE | 1), (0x5128, 7)]);
    let regs = kvm_regs { rip: 0x512b, rdi: 0x6000, r15: 0x7fff_0000_0000, ..Default::default() };
    let long = kvm_sregs { cr3: 0x1018, efer: LONG_MODE, ..Default::default() };
    let mut seen = Vec::new();
    FirstPages::of(&regs, &long).unwrap().touch(|gpa| {
        seen.push(gpa);
        words.get(&gpa).copied()
    });
    assert_eq!(seen[..4], [0x1000, 0x2000, 0x3000, 0x5128]);
    assert!(seen.contains(&0x6000) && seen.iter().all(|gpa| *gpa < 0x8000), "{seen:x?}");
    assert_eq!(FirstPages::of(&regs, &kvm_sregs { cr3: 0x1000, ..Default::default() }), None);
}
