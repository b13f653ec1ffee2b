use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::read_mapping::ReadMapping;
use super::*;
use crate::layout::{Gpa, MemoryLayout, Region};
use crate::sys::memfd::punch_hole;
use crate::sys::nofault::Probe;
use crate::sys::page_mapping::PageMapping;
use crate::sys::testing::{TestMemory, poison, without_cap_sys_admin};
use crate::vmm::attached_memory::AttachedFile;

mod ended_vmm;

pub(super) const PAGE: usize = 4096;
pub(super) const PAGES: usize = 16;
pub(super) const BYTES: u64 = (PAGES * PAGE) as u64;

fn memfd() -> File {
    crate::sys::memfd::memfd("guest", BYTES).unwrap().into()
}

fn memory(hva: u64, file: Option<File>) -> Result<GuestMemory, ReadError> {
    memory_of(std::process::id(), hva, file.map(|file| AttachedFile { fd: file.into(), offset: 0 }))
}

fn memory_of(vmm_pid: u32, hva: u64, file: Option<AttachedFile>) -> Result<GuestMemory, ReadError> {
    let backing = if file.is_some() { Backing::Memfd } else { Backing::Anonymous };
    let region = Region { gpa: Gpa(0), size: BYTES, page_size: PAGE as u64, backing };
    GuestMemory::new(AttachedMemory {
        vmm_pid,
        layout: MemoryLayout::new(vec![region]).unwrap(),
        regions: vec![AttachedRegion { hva: Hva(hva), file, uffd: None }],
        uffds: Vec::new(),
        collapse: false,
    })
}

/// The contents of a run of pages, and the byte that fills each page with data.
pub(super) fn read(memory: &GuestMemory, page: u64, count: u64) -> (Vec<Found>, Vec<u8>) {
    let (mut kinds, mut bytes, mut at) = (Runs::default(), Vec::new(), page);
    while at < page + count {
        let (found, more, _) = read_one_place(memory, at, page + count - at);
        at += found.iter().map(|run| run.count()).sum::<u64>();
        found.into_iter().for_each(|run| kinds.push(run));
        bytes.extend(more);
    }
    assert_eq!(at, page + count);
    (kinds.0, bytes)
}

/// The same, of as many pages as one read gives, and whether it gave them in place.
fn read_one_place(memory: &GuestMemory, page: u64, count: u64) -> (Vec<Found>, Vec<u8>, bool) {
    let (mut buffer, mut runs) = (vec![0xee; count as usize * PAGE], Runs::default());
    let place = memory.read(0, page, count, &mut buffer, &mut runs).unwrap();
    let pages: u64 = runs.iter().map(Found::count).sum();
    assert!((1..=count).contains(&pages));
    if let PageBytes::Mapped(mapped) = place {
        assert!(mapped.read(&mut buffer[..pages as usize * PAGE]));
    }
    let (kinds, bytes) = found(&runs, &buffer);
    (kinds, bytes, matches!(place, PageBytes::Mapped(_)))
}

fn blocks(file: &File) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
}

fn found(runs: &Runs, buffer: &[u8]) -> (Vec<Found>, Vec<u8>) {
    let mut pages = buffer.chunks_exact(PAGE);
    let mut bytes = Vec::new();
    for run in runs.iter() {
        for page in pages.by_ref().take(run.count() as usize) {
            if matches!(run, Found::Data(_)) {
                assert!(page.iter().all(|byte| *byte == page[0]));
                bytes.push(page[0]);
            }
        }
    }
    (runs.iter().collect(), bytes)
}

use Found::{Data, Poison, Zero};

#[test]
fn a_process_gives_data_zeros_and_absent_pages() {
    let mapping = TestMemory::anonymous(BYTES);
    mapping.fill(2, 0xab);
    mapping.fill(3, 0);
    mapping.fill(4, 0xcd);
    let memory = memory(mapping.hva().0, None).unwrap();
    // Attaching has read from the first page.
    assert_eq!(memory.held(0).unwrap(), [(0, 1), (2, 5)]);
    let found = read(&memory, 0, PAGES as u64);
    assert_eq!(found, (vec![Zero(2), Data(1), Zero(1), Data(1), Zero(11)], vec![0xab, 0xcd]));
    assert_eq!(read(&memory, 4, 1), (vec![Data(1)], vec![0xcd]));
}

#[test]
fn a_file_gives_data_zeros_and_holes() {
    let file = memfd();
    file.write_all_at(&[1; PAGE], 3 * PAGE as u64).unwrap();
    file.write_all_at(&[0; PAGE], 4 * PAGE as u64).unwrap();
    file.write_all_at(&[2; 2 * PAGE], 5 * PAGE as u64).unwrap();
    let memory = memory(0, Some(file)).unwrap();
    let kinds = vec![Zero(2), Data(1), Zero(1), Data(2), Zero(4)];
    assert_eq!(read(&memory, 1, 10), (kinds, vec![1, 2, 2]));
    assert_eq!(memory.held(0).unwrap(), [(3, 7)]);
}

#[test]
fn pages_of_a_file_are_read_in_place() {
    let file = memfd();
    for (page, byte) in [1, 0, 0, 2, 3, 0, 4, 4].into_iter().enumerate() {
        file.write_all_at(&[byte; PAGE], (4 + page) as u64 * PAGE as u64).unwrap();
    }
    let memory = memory(0, Some(file)).unwrap();
    let kinds = vec![Data(1), Zero(2), Data(2), Zero(1), Data(2)];
    assert_eq!(read_one_place(&memory, 4, 8), (kinds, vec![1, 2, 3, 4, 4], true));
    assert_eq!(read_one_place(&memory, 7, 2), (vec![Data(2)], vec![2, 3], true));
    assert_eq!(read_one_place(&memory, 5, 1), (vec![Zero(1)], vec![], true));
}

#[test]
fn one_byte_that_is_not_zero_makes_contents() {
    let file = memfd();
    file.write_all_at(&[0; PAGES * PAGE], 0).unwrap();
    for (page, byte) in [0, 15, 16, 63, 64, 2048, 4031, 4032, 4095].into_iter().enumerate() {
        file.write_all_at(&[1], (page * PAGE + byte) as u64).unwrap();
    }
    let memory = memory(0, Some(file)).unwrap();
    let (mut buffer, mut runs) = (vec![0; PAGES * PAGE], Runs::default());
    assert!(matches!(memory.read(0, 0, 16, &mut buffer, &mut runs).unwrap(), PageBytes::Mapped(_)));
    assert_eq!(runs.iter().collect::<Vec<_>>(), [Data(9), Zero(7)]);
}

#[test]
fn a_hole_among_pages_stays_a_hole() {
    let file = memfd();
    file.write_all_at(&[5; 7 * PAGE], 0).unwrap();
    file.write_all_at(&[6; 8 * PAGE], 8 * PAGE as u64).unwrap();
    let before = blocks(&file);
    let memory = memory(0, Some(file.try_clone().unwrap())).unwrap();
    assert_eq!(read_one_place(&memory, 0, 16), (vec![Data(7)], vec![5; 7], true));
    assert_eq!(read_one_place(&memory, 7, 9), (vec![Zero(1)], vec![], false));
    assert_eq!(read_one_place(&memory, 8, 8), (vec![Data(8)], vec![6; 8], true));
    assert_eq!(blocks(&file), before);
}

/// A marker in a mapping of ours stands in for a page of the file that has gone bad: a read of either gives SIGBUS, and
/// `EFAULT` to system calls.
#[test]
fn a_bad_page_is_not_shown_and_ends_no_process() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = PageMapping::readable(&file, 0, BYTES).unwrap();
    let pages = mapping.pages(0, PAGES as u64).unwrap();
    let Some(_uffd) = poison(pages.address(), PAGES as u64, 5) else { return };
    assert_eq!([4, 5, 6].map(|page| pages.probe(page)), [Probe::Contents, Probe::Unreadable, Probe::Contents]);
}

#[test]
fn pages_around_a_bad_page_are_shown() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = ReadMapping::new(&file, 0, BYTES).unwrap();
    let at = mapping.show(0, 1, &mut Runs::default()).unwrap();
    let Some(_uffd) = poison(at.address(), PAGES as u64, 5) else { return };
    let show = |page, count| {
        let mut runs = Runs::default();
        mapping.show(page, count, &mut runs).map(|_| runs.0)
    };
    assert_eq!([show(0, 16), show(5, 11), show(5, 1)], [Ok(vec![Data(5)]), Err(1), Err(1)]);
    assert_eq!(show(6, 10), Ok(vec![Data(10)]));
}

#[test]
fn all_pages_of_the_file_are_mapped_ahead_and_no_holes() {
    const PAGES: u64 = 2048;
    let file = memfd();
    file.set_len(PAGES * PAGE as u64).unwrap();
    file.write_all_at(&vec![9; 1024 * PAGE], 512 * PAGE as u64).unwrap();
    file.write_all_at(&[9; PAGE], 0).unwrap();
    let mapping = ReadMapping::new(&file, 0, PAGES * PAGE as u64).unwrap();
    let at = Hva(mapping.show(0, 1, &mut Runs::default()).unwrap().address());
    let pagemap = Pagemap::open(std::process::id(), at, PAGE as u64).unwrap();
    let mapped = |from, count| (from..from + count).filter(|page| pagemap.first_mapped(*page, 1).unwrap().is_some());
    mapping.map_ahead(&|| false);
    assert_eq!(mapped(512, 1024).count(), 0, "told to stop");
    let steps = std::cell::Cell::new(0);
    mapping.map_ahead(&|| steps.replace(steps.get() + 1) < 2);
    // A fault maps up to 15 neighbours as well.
    assert_eq!((mapped(512, 512).count(), mapped(1040, 496).count()), (512, 0), "told to stop later");
    mapping.map_ahead(&|| true);
    assert_eq!((mapped(512, 1024).count(), mapped(1536, 512).count()), (1024, 0));
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()), 1025 * 8, "no hole is filled");
    let mut runs = Runs::default();
    mapping.show(1500, 64, &mut runs).unwrap();
    assert_eq!(runs.iter().collect::<Vec<_>>(), [Data(36)]);
}

#[test]
fn pages_beyond_the_end_of_a_file_are_not_shown() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = ReadMapping::new(&file, 0, BYTES).unwrap();
    let show = |page, count| mapping.show(page, count, &mut Runs::default()).map(|_| ());
    assert_eq!([show(8, 8), show(9, 8), show(u64::MAX >> 12, 8)], [Ok(()), Err(8), Err(8)]);
    file.set_len(12 * PAGE as u64).unwrap();
    assert_eq!(show(12, 4), Err(4));
    let mut runs = Runs::default();
    mapping.show(8, 8, &mut runs).unwrap();
    assert_eq!(runs.iter().collect::<Vec<_>>(), [Data(4)]);
}

#[test]
fn file_that_is_shorter_than_its_region_is_refused() {
    let file = memfd();
    file.set_len(PAGE as u64 + 100).unwrap();
    let refused = memory(0, Some(file)).unwrap_err();
    assert!(matches!(refused, ReadError::FileShorter { offset: 4196 }), "{refused}");
}

#[test]
fn reading_does_not_move_the_offset_of_the_vmm() {
    let file = memfd();
    file.write_all_at(&[7; PAGE], 4 * PAGE as u64).unwrap();
    let memory = memory(0, Some(file.try_clone().unwrap())).unwrap();
    read(&memory, 0, PAGES as u64);
    memory.held(0).unwrap();
    assert_eq!(io::Seek::stream_position(&mut &file).unwrap(), 0);
}

#[test]
fn a_poison_marker_is_found_in_a_process() {
    let mapping = TestMemory::anonymous(BYTES);
    (0..PAGES as u64).for_each(|page| mapping.fill(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let memory = memory(mapping.hva().0, None).unwrap();
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn changes_of_a_process_after_a_full_read_are_found() {
    let mapping = TestMemory::anonymous(BYTES);
    (0..PAGES as u64).for_each(|page| mapping.fill(page, 9));
    let memory = memory(mapping.hva().0, None).unwrap();
    assert_eq!(read(&memory, 0, 16), (vec![Data(16)], vec![9; 16]));
    let Some(_uffd) = mapping.poison(5) else { return };
    mapping.discard(7);
    let kinds = vec![Data(5), Poison(1), Data(1), Zero(1), Data(8)];
    assert_eq!(read(&memory, 0, 16), (kinds, vec![9; 14]));
}

#[test]
fn efault_means_poison_where_the_page_tables_are_not_read() {
    let mapping = TestMemory::anonymous(BYTES);
    (0..PAGES as u64).for_each(|page| mapping.fill(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let size = (PAGES * PAGE) as u64;
    let region = Region { gpa: Gpa(0), size, page_size: PAGE as u64, backing: Backing::Anonymous };
    let reader = ProcessReader::new(std::process::id(), mapping.hva(), &region, None).unwrap();
    let (mut buffer, mut runs) = (vec![0; 3 * PAGE], Runs::default());
    reader.read(4, 3, &mut buffer, &mut runs).unwrap();
    assert_eq!(found(&runs, &buffer), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn a_poison_marker_in_the_mapping_counts_for_a_memfd() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = TestMemory::of_file(&file, 0, BYTES);
    let Some(_uffd) = mapping.poison(5) else { return };
    let memory = memory(mapping.hva().0, Some(file)).unwrap();
    let kinds = vec![Data(1), Poison(1), Data(1)];
    assert_eq!(read(&memory, 4, 3), (kinds, vec![9, 9]));
}

#[test]
fn a_poison_marker_is_found_without_the_right_to_see_its_kind() {
    for backing in [Some(memfd()), None] {
        let mapping =
            backing.as_ref().map_or_else(|| TestMemory::anonymous(BYTES), |file| TestMemory::of_file(file, 0, BYTES));
        (0..PAGES as u64).for_each(|page| mapping.fill(page, 9));
        let Some(_uffd) = mapping.poison(5) else { return };
        let found = without_cap_sys_admin(|| {
            let memory = memory(mapping.hva().0, backing).unwrap();
            read(&memory, 0, PAGES as u64)
        });
        let kinds = vec![Data(5), Poison(1), Data(PAGES as u64 - 6)];
        assert_eq!(found, (kinds, vec![9; PAGES - 1]));
    }
}

/// A VM with all pages full of 9s, three of them read already.
fn read_before() -> (File, TestMemory, GuestMemory) {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = TestMemory::of_file(&file, 0, BYTES);
    let memory = memory(mapping.hva().0, Some(file.try_clone().unwrap())).unwrap();
    assert_eq!(read_one_place(&memory, 4, 3), (vec![Data(3)], vec![9; 3], true));
    (file, mapping, memory)
}

#[test]
fn poison_marker_of_a_running_vm_is_found_after_the_next_stop() {
    let (_file, mapping, memory) = read_before();
    let Some(_uffd) = mapping.poison(5) else { return };
    memory.stopped();
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn page_poisoned_while_frozen_is_not_sent_as_zero() {
    let (file, mapping, memory) = read_before();
    let Some(_uffd) = mapping.poison(5) else { return };
    punch_hole(&file, 5 * PAGE_SIZE, PAGE_SIZE).unwrap();
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
    assert_eq!(read(&memory, 5, 1), (vec![Poison(1)], vec![]));
}

/// `/proc/PID/mem` answers a read of a poison marker with `EIO`, as a file with a poisoned page does.
#[test]
fn eio_of_a_file_means_poison() {
    let mapping = TestMemory::anonymous(BYTES);
    (0..PAGES as u64).for_each(|page| mapping.fill(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let size = (PAGES * PAGE) as u64;
    let region = Region { gpa: Gpa(0), size, page_size: PAGE as u64, backing: Backing::Memfd };
    let reader = FileReader::new(File::open("/proc/self/mem").unwrap().into(), mapping.hva().0, &region, None);
    let (mut buffer, mut runs) = (vec![0; 8 * PAGE], Runs::default());
    for (count, after) in [(4, 1), (8, 5)] {
        runs.0.clear();
        assert!(matches!(reader.read(3, count, &mut buffer, &mut runs).unwrap(), PageBytes::InBuffer));
        let kinds = vec![Data(2), Poison(1), Data(after)];
        assert_eq!(found(&runs, &buffer), (kinds, vec![9; 2 + after as usize]));
    }
}

#[test]
fn unmapped_memory_is_an_error_and_neither_zeros_nor_poison() {
    let mapping = TestMemory::out_of_the_way(BYTES);
    mapping.fill(0, 1);
    let memory = memory(mapping.hva().0, None).unwrap();
    drop(mapping);
    let found = memory.read(0, 0, PAGES as u64, &mut [0; PAGES * PAGE], &mut Runs::default());
    assert!(matches!(found, Err(ReadError::NotMapped { .. })), "{found:?}");
}

#[test]
fn an_address_with_no_memory_is_refused_at_once() {
    let refused = memory(0x1000, None);
    assert!(matches!(refused, Err(ReadError::NotMapped { hva: 0x1000, .. })), "{refused:?}");
}

#[test]
fn a_vmm_that_dies_is_an_error_and_not_zeros() {
    let mapping = TestMemory::anonymous(BYTES);
    mapping.fill(0, 1);
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let region = Region { gpa: Gpa(0), size: PAGE as u64, page_size: PAGE as u64, backing: Backing::Anonymous };
    let stack = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
    let hva = u64::from_str_radix(stack.split('-').next().unwrap(), 16).unwrap();
    let pagemap = Pagemap::open(child.id(), Hva(hva), PAGE as u64).unwrap();
    let reader = ProcessReader::new(child.id(), Hva(hva), &region, Some(pagemap)).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let found = reader.read(0, 1, &mut [0; PAGE], &mut Runs::default());
    assert!(matches!(found, Err(ReadError::VmmGone { .. })), "{found:?}");
}

#[test]
fn file_that_became_shorter_is_an_error_and_never_zeros() {
    for seen_before in [false, true] {
        let file = memfd();
        (0..PAGES as u64).for_each(|page| file.write_all_at(&[7; PAGE], page * PAGE as u64).unwrap());
        let mapping = TestMemory::of_file(&file, 0, BYTES);
        let memory = memory(mapping.hva().0, Some(file.try_clone().unwrap())).unwrap();
        if seen_before {
            assert_eq!(read(&memory, 0, PAGES as u64).0, [Found::Data(PAGES as u64)]);
        }
        file.set_len(4 * PAGE as u64).unwrap();
        assert_eq!(read(&memory, 0, 4).0, [Found::Data(4)]);
        for (page, count) in [(4, 1), (4, 12), (2, 8), (15, 1)] {
            let mut buffer = vec![0; PAGES * PAGE];
            let mut runs = Runs::default();
            let (mut at, end) = (page, page + count);
            let outcome = loop {
                match memory.read(0, at, end - at, &mut buffer, &mut runs) {
                    Ok(_) => at += runs.iter().map(Found::count).sum::<u64>(),
                    Err(error) => break error,
                }
                assert!(at < end, "pages {page} + {count} were served, seen before: {seen_before}");
            };
            assert!(matches!(outcome, ReadError::FileShorter { .. }), "{outcome}");
            assert!(at <= page.max(4), "pages {page} to {at} were served");
        }
    }
}
