use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use super::read_mapping::ReadMapping;
use super::*;
use crate::layout::{Gpa, MemoryLayout, Region};
use crate::sys::nofault::{self, Probe};
use crate::vmm::attached_memory::AttachedFile;

mod ended_vmm;

pub(super) const PAGE: usize = 4096;
pub(super) const PAGES: usize = 16;

/// A mapping of this process, which stands in for the VMM's.
pub(super) struct Mapping {
    pub(super) at: u64,
}

impl Mapping {
    fn new(fd: Option<&File>) -> Self {
        Self::near(std::ptr::null_mut(), fd)
    }

    /// At an address where the kernel puts nothing by itself, so no other test is there once this is gone.
    pub(super) fn out_of_the_way() -> Self {
        Self::near((1u64 << 37) as *mut libc::c_void, None)
    }

    fn near(hint: *mut libc::c_void, fd: Option<&File>) -> Self {
        let flags = if fd.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = fd.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a fresh mapping.
        let at = unsafe { libc::mmap(hint, PAGES * PAGE, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at: at as u64 }
    }

    pub(super) fn write(&self, page: usize, byte: u8) {
        // SAFETY: within the mapping, which nobody else refers to.
        unsafe { std::ptr::write_bytes((self.at as usize + page * PAGE) as *mut u8, byte, PAGE) }
    }

    fn poison(&self, page: usize) -> Option<OwnedFd> {
        poison(self.at, page)
    }
}

/// Puts a poison marker on a page of a mapping, by a uffd that traps nothing; `None`: the kernel will not, and why is printed.
fn poison(at: u64, page: usize) -> Option<OwnedFd> {
    let failed = |what: &str| {
        println!("skipped: {what}: {}", io::Error::last_os_error());
        None
    };
    let hva = at + (page * PAGE) as u64;
    // SAFETY: plain system calls on structures that live long enough; the page is one of ours.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC);
        if fd < 0 {
            return failed("userfaultfd");
        }
        let uffd = OwnedFd::from_raw_fd(fd as i32);
        let mut api: [u64; 3] = [0xaa, 1 << 14, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc018_aa3f, &mut api) != 0 {
            return failed("UFFDIO_API with POISON");
        }
        let mut register: [u64; 4] = [at, (PAGES * PAGE) as u64, 2, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc020_aa00, &mut register) != 0 {
            return failed("UFFDIO_REGISTER wp");
        }
        libc::madvise(hva as *mut libc::c_void, PAGE, libc::MADV_DONTNEED);
        let mut poison: [u64; 4] = [hva, PAGE as u64, 0, 0];
        if libc::ioctl(uffd.as_raw_fd(), 0xc020_aa08, &mut poison) != 0 {
            return failed("UFFDIO_POISON");
        }
        Some(uffd)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.at as *mut libc::c_void, PAGES * PAGE) };
    }
}

fn memfd() -> File {
    crate::sys::memfd::memfd("guest", (PAGES * PAGE) as u64).unwrap().into()
}

fn memory(hva: u64, file: Option<File>) -> Result<GuestMemory, ReadError> {
    memory_of(std::process::id(), hva, file.map(|file| AttachedFile { fd: file.into(), offset: 0 }))
}

fn memory_of(vmm_pid: u32, hva: u64, file: Option<AttachedFile>) -> Result<GuestMemory, ReadError> {
    let backing = if file.is_some() { Backing::Memfd } else { Backing::Anonymous };
    let region = Region { gpa: Gpa(0), size: (PAGES * PAGE) as u64, page_size: PAGE as u64, backing };
    GuestMemory::new(AttachedMemory {
        vmm_pid,
        layout: MemoryLayout::new(vec![region]).unwrap(),
        regions: vec![AttachedRegion { hva: Hva(hva), file, uffd: None }],
        uffds: Vec::new(),
        collapse: false,
    })
}

/// What a run of pages is, and the byte that each page with contents is filled with.
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

/// The same of as many as are in one place, and whether they were shown where they lie.
fn read_one_place(memory: &GuestMemory, page: u64, count: u64) -> (Vec<Found>, Vec<u8>, bool) {
    let (mut buffer, mut runs) = (vec![0xee; count as usize * PAGE], Runs::default());
    let place = memory.read(0, page, count, &mut buffer, &mut runs).unwrap();
    let pages: u64 = runs.iter().map(Found::count).sum();
    assert!((1..=count).contains(&pages));
    if let PageBytes::Mapped(at) = place {
        let bytes = pages as usize * PAGE;
        // SAFETY: so many pages are there, as long as the memory is.
        buffer[..bytes].copy_from_slice(unsafe { std::slice::from_raw_parts(at, bytes) });
    }
    let (kinds, bytes) = found(&runs, &buffer);
    (kinds, bytes, place != PageBytes::InBuffer)
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
fn a_process_gives_data_zeros_and_what_was_never_there() {
    let mapping = Mapping::new(None);
    mapping.write(2, 0xab);
    mapping.write(3, 0);
    mapping.write(4, 0xcd);
    let memory = memory(mapping.at, None).unwrap();
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
fn pages_of_a_file_are_shown_where_they_lie() {
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
    let mapping = Mapping::new(Some(&file));
    let Some(_uffd) = mapping.poison(5) else { return };
    nofault::prepare();
    let at = |page: usize| (mapping.at as usize + page * PAGE) as *const u8;
    // SAFETY: pages of a mapping; `prepare` was called.
    let look = |page| unsafe { nofault::probe_zero(at(page)) };
    assert_eq!([look(4), look(5), look(6)], [Probe::Contents, Probe::Unreadable, Probe::Contents]);
}

#[test]
fn what_is_around_a_bad_page_is_shown() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = ReadMapping::new(&file, 0, (PAGES * PAGE) as u64).unwrap();
    let at = mapping.show(0, 1, &mut Runs::default()).unwrap();
    let Some(_uffd) = poison(at as u64, 5) else { return };
    let show = |page, count| {
        let mut runs = Runs::default();
        mapping.show(page, count, &mut runs).map(|_| runs.0)
    };
    assert_eq!([show(0, 16), show(5, 11), show(5, 1)], [Ok(vec![Data(5)]), Err(1), Err(1)]);
    assert_eq!(show(6, 10), Ok(vec![Data(10)]));
}

#[test]
fn what_is_mapped_ahead_is_what_the_file_has() {
    const PAGES: u64 = 2048;
    let file = memfd();
    file.set_len(PAGES * PAGE as u64).unwrap();
    file.write_all_at(&vec![9; 1024 * PAGE], 512 * PAGE as u64).unwrap();
    file.write_all_at(&[9; PAGE], 0).unwrap();
    let mapping = ReadMapping::new(&file, 0, PAGES * PAGE as u64).unwrap();
    let at = Hva(mapping.show(0, 1, &mut Runs::default()).unwrap() as u64);
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
    let mapping = ReadMapping::new(&file, 0, (PAGES * PAGE) as u64).unwrap();
    let show = |page, count| mapping.show(page, count, &mut Runs::default()).map(|_| ());
    assert_eq!([show(8, 8), show(9, 8), show(u64::MAX >> 12, 8)], [Ok(()), Err(8), Err(8)]);
    file.set_len(12 * PAGE as u64).unwrap();
    assert_eq!(show(12, 4), Err(4));
    let mut runs = Runs::default();
    mapping.show(8, 8, &mut runs).unwrap();
    assert_eq!(runs.iter().collect::<Vec<_>>(), [Data(4)]);
    nofault::prepare();
    let at = mapping.show(0, 8, &mut Runs::default()).unwrap();
    // SAFETY: a page of the mapping, beyond the end of the file: SIGBUS; `prepare` was called.
    assert_eq!(unsafe { nofault::probe_zero(at.wrapping_add(12 * PAGE)) }, Probe::Unreadable);
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
    let mapping = Mapping::new(None);
    (0..PAGES).for_each(|page| mapping.write(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let memory = memory(mapping.at, None).unwrap();
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn what_becomes_of_a_process_s_pages_that_were_all_there_is_told() {
    let mapping = Mapping::new(None);
    (0..PAGES).for_each(|page| mapping.write(page, 9));
    let memory = memory(mapping.at, None).unwrap();
    assert_eq!(read(&memory, 0, 16), (vec![Data(16)], vec![9; 16]));
    let Some(_uffd) = mapping.poison(5) else { return };
    // SAFETY: a page of the mapping, to which nobody refers.
    unsafe { libc::madvise((mapping.at as usize + 7 * PAGE) as *mut libc::c_void, PAGE, libc::MADV_DONTNEED) };
    let kinds = vec![Data(5), Poison(1), Data(1), Zero(1), Data(8)];
    assert_eq!(read(&memory, 0, 16), (kinds, vec![9; 14]));
}

#[test]
fn a_process_tells_poison_by_efault_where_the_page_tables_are_not_read() {
    let mapping = Mapping::new(None);
    (0..PAGES).for_each(|page| mapping.write(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let size = (PAGES * PAGE) as u64;
    let region = Region { gpa: Gpa(0), size, page_size: PAGE as u64, backing: Backing::Anonymous };
    let reader = ProcessReader::new(std::process::id(), Hva(mapping.at), &region, None).unwrap();
    let (mut buffer, mut runs) = (vec![0; 3 * PAGE], Runs::default());
    reader.read(4, 3, &mut buffer, &mut runs).unwrap();
    assert_eq!(found(&runs, &buffer), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn a_poison_marker_is_found_under_a_memfd_that_does_not_know() {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = Mapping::new(Some(&file));
    let Some(_uffd) = mapping.poison(5) else { return };
    let memory = memory(mapping.at, Some(file)).unwrap();
    let kinds = vec![Data(1), Poison(1), Data(1)];
    assert_eq!(read(&memory, 4, 3), (kinds, vec![9, 9]));
}

/// A thread without `CAP_SYS_ADMIN`, as in the shipped unit (capabilities(7), `_LINUX_CAPABILITY_VERSION_3`).
fn without_cap_sys_admin<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let dropped = || {
        const CAP_SYS_ADMIN: u32 = 21;
        let (mut header, mut sets) = ([0x2008_0522u32, 0], [[0u32; 3]; 2]);
        // SAFETY: the header and both parts of the sets of this thread.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()), 0);
            sets[0][0] &= !(1 << CAP_SYS_ADMIN);
            assert_eq!(libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()), 0);
        }
        work()
    };
    std::thread::scope(|scope| scope.spawn(dropped).join().unwrap())
}

#[test]
fn a_poison_marker_is_found_without_the_right_to_see_its_kind() {
    for backing in [Some(memfd()), None] {
        let mapping = Mapping::new(backing.as_ref());
        (0..PAGES).for_each(|page| mapping.write(page, 9));
        let Some(_uffd) = mapping.poison(5) else { return };
        let found = without_cap_sys_admin(|| {
            let memory = memory(mapping.at, backing).unwrap();
            read(&memory, 0, PAGES as u64)
        });
        let kinds = vec![Data(5), Poison(1), Data(PAGES as u64 - 6)];
        assert_eq!(found, (kinds, vec![9; PAGES - 1]));
    }
}

/// A VM of which all pages are 9s, looked at once.
fn looked_at() -> (File, Mapping, GuestMemory) {
    let file = memfd();
    file.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    let mapping = Mapping::new(Some(&file));
    let memory = memory(mapping.at, Some(file.try_clone().unwrap())).unwrap();
    assert_eq!(read_one_place(&memory, 4, 3), (vec![Data(3)], vec![9; 3], true));
    (file, mapping, memory)
}

#[test]
fn a_poison_marker_that_came_while_the_vm_ran_is_found_when_it_was_stopped_again() {
    let (_file, mapping, memory) = looked_at();
    let Some(_uffd) = mapping.poison(5) else { return };
    memory.stopped();
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
}

#[test]
fn a_page_that_goes_bad_while_the_vm_stands_still_and_loses_its_contents_does_not_read_as_zeros() {
    let (file, mapping, memory) = looked_at();
    let Some(_uffd) = mapping.poison(5) else { return };
    let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), how, 5 * PAGE as i64, PAGE as i64) }, 0);
    assert_eq!(read(&memory, 4, 3), (vec![Data(1), Poison(1), Data(1)], vec![9, 9]));
    assert_eq!(read(&memory, 5, 1), (vec![Poison(1)], vec![]));
}

/// `/proc/PID/mem` answers a read of a poison marker with `EIO`, as a file with a poisoned page does.
#[test]
fn a_file_tells_poison_by_eio() {
    let mapping = Mapping::new(None);
    (0..PAGES).for_each(|page| mapping.write(page, 9));
    let Some(_uffd) = mapping.poison(5) else { return };
    let size = (PAGES * PAGE) as u64;
    let region = Region { gpa: Gpa(0), size, page_size: PAGE as u64, backing: Backing::Memfd };
    let reader = FileReader::new(File::open("/proc/self/mem").unwrap().into(), mapping.at, &region, None);
    let (mut buffer, mut runs) = (vec![0; 8 * PAGE], Runs::default());
    for (count, after) in [(4, 1), (8, 5)] {
        runs.0.clear();
        assert_eq!(reader.read(3, count, &mut buffer, &mut runs).unwrap(), PageBytes::InBuffer);
        let kinds = vec![Data(2), Poison(1), Data(after)];
        assert_eq!(found(&runs, &buffer), (kinds, vec![9; 2 + after as usize]));
    }
}

#[test]
fn unmapped_memory_is_an_error_and_neither_zeros_nor_poison() {
    let mapping = Mapping::out_of_the_way();
    mapping.write(0, 1);
    let memory = memory(mapping.at, None).unwrap();
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
    let mapping = Mapping::new(None);
    mapping.write(0, 1);
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
        let mapping = Mapping::new(Some(&file));
        let memory = memory(mapping.at, Some(file.try_clone().unwrap())).unwrap();
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
