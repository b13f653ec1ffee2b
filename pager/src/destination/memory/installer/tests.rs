//! An `EEXIST` is believed only where the page tables prove it: on real memory of this process.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::destination::page_table::PageState;
use crate::destination::pages::resolver::Resolver;
use crate::event_log::EventLog;
use crate::layout::address_map::PageNumbering;
use crate::layout::{Backing, Gpa, MemoryLayout, Region};
use crate::proto::MemoryError;
use crate::sys::procfs::process_started;
use crate::sys::testing::TestMemory;
use crate::sys::uffd_probe::probe;
use crate::sys::userfaultfd::feature;

const HUGE: u64 = 2 << 20;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Guest memory of this process, registered.
struct Memory {
    memory: TestMemory,
    uffd: Arc<Userfaultfd>,
    file: Option<OwnedFd>,
    layout: MemoryLayout,
}

impl Memory {
    /// Skipped, with the reason printed, where the kernel does not permit it.
    fn new(page_size: u64, pages: u64, backing: Backing) -> Option<Self> {
        let mut features = feature::POISON | feature::MISSING_SHMEM | feature::MINOR_SHMEM;
        features |= if page_size == HUGE { feature::MISSING_HUGETLBFS } else { 0 };
        if let Err(reason) = probe(features) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let size = page_size * pages;
        let huge = if page_size == HUGE { MemfdFlags::HUGETLB } else { MemfdFlags::empty() };
        let file = (backing == Backing::Memfd).then(|| {
            let fd = memfd_create("guest", MemfdFlags::CLOEXEC | huge).unwrap();
            ftruncate(&fd, size).unwrap();
            fd
        });
        let memory = file.as_ref().map_or_else(|| TestMemory::anonymous(size), |fd| TestMemory::of_file(fd, 0, size));
        let uffd = Userfaultfd::create().unwrap();
        uffd.enable(features).unwrap();
        uffd.register(memory.hva(), size).unwrap();
        let layout = MemoryLayout::new(vec![Region { gpa: Gpa(0), size, page_size, backing }]).unwrap();
        Some(Self { memory, uffd: Arc::new(uffd), file, layout })
    }

    fn installer(&self) -> Installer {
        let numbering = PageNumbering::new(&self.layout);
        let address_map = AddressMap::new(numbering, vec![self.memory.hva()]).unwrap();
        let file = self.file.as_ref().map(|fd| AttachedFile { fd: fd.try_clone().unwrap(), offset: 0 });
        let backing = RegionBacking { uffd: self.uffd.clone(), file };
        Installer::new(address_map, vec![backing], std::process::id(), true).unwrap()
    }

    fn resolver(&self) -> (Resolver, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let (table, _) = PageTable::open(&directory.path().join("pages"), &self.layout).unwrap();
        let mut resolver = Resolver::new(PageNumbering::new(&self.layout), table, EventLog::default());
        let pid = std::process::id();
        resolver.attach(pid, process_started(pid), self.installer(), None).unwrap();
        (resolver, directory)
    }

    /// The byte at an address, as a system call finds it; `None`: poison. Only of a page that is mapped.
    fn byte(&self, offset: u64) -> Option<u8> {
        self.memory.byte(offset)
    }

    /// Puts a page there as a pager that died would have left it.
    fn copy(&self, page: u64, byte: u8) {
        let size = self.layout.regions()[0].page_size;
        let bytes = vec![byte; size as usize];
        assert_eq!(self.uffd.copy(Hva(self.memory.at(page * size)), &bytes).stop, None);
    }
}

/// The pool is the machine's: one test at a time changes it.
static POOL_USE: Mutex<()> = Mutex::new(());

/// Leaves so many huge pages in the pool as long as it lives.
struct Pool {
    _alone: MutexGuard<'static, ()>,
    before: u64,
    taken: Option<TestMemory>,
}

impl Pool {
    fn with_free(free: u64) -> Option<Self> {
        let alone = POOL_USE.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |name: &str| fs::read_to_string(format!("{POOL}/{name}")).ok()?.trim().parse::<u64>().ok();
        let (before, reserved) = (read("nr_hugepages")?, read("resv_hugepages")?);
        let set = fs::write(format!("{POOL}/nr_hugepages"), (before + free).to_string());
        let available = read("free_hugepages")?.saturating_sub(reserved);
        if set.is_err() || available < free {
            eprintln!("skipped: no huge pages can be set aside ({available} of {free})");
            let _ = fs::write(format!("{POOL}/nr_hugepages"), before.to_string());
            return None;
        }
        let taken = (available > free).then(|| TestMemory::huge((available - free) * HUGE));
        Some(Self { _alone: alone, before, taken })
    }

    fn add(&self, pages: u64) {
        let now: u64 = fs::read_to_string(format!("{POOL}/nr_hugepages")).unwrap().trim().parse().unwrap();
        fs::write(format!("{POOL}/nr_hugepages"), (now + pages).to_string()).unwrap();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.taken.take());
        let _ = fs::write(format!("{POOL}/nr_hugepages"), self.before.to_string());
    }
}

fn table(memory: &Memory) -> (PageTable, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (PageTable::open(&directory.path().join("pages"), &memory.layout).unwrap().0, directory)
}

fn huge_page(page: u64) -> PageRun {
    PageRun { region: 0, page: page * (HUGE / PAGE_SIZE), count: HUGE / PAGE_SIZE }
}

/// Brings a huge page, full of one byte.
fn bring(installer: &mut Installer, table: &mut PageTable, page: u64, byte: u8) -> Option<Stop> {
    let mut handled = 0;
    installer.pieces(table, huge_page(page), LaneKind::Bulk, &vec![byte; HUGE as usize], &mut handled).stop
}

#[test]
fn huge_page_that_the_pool_lacks_is_not_present_and_comes_once_there_is_one() {
    let Some(pool) = Pool::with_free(1) else { return };
    let Some(memory) = Memory::new(HUGE, 3, Backing::Memfd) else { return };
    let (mut installer, (mut table, _directory)) = (memory.installer(), table(&memory));
    assert_eq!(bring(&mut installer, &mut table, 0, 7), None);
    assert_eq!(bring(&mut installer, &mut table, 1, 8), Some(Stop::NoMemory));
    assert_eq!(table.state(PageIndex(1)), Some(PageState::Installing));
    // Zeros are made at the touch, and nobody may take a page that could not be made for one that is there.
    let zeros = installer.zeros(&mut table, huge_page(2), LaneKind::Bulk);
    assert_eq!((zeros.stop, table.state(PageIndex(2))), (None, Some(PageState::PresentZero)));
    assert_eq!(installer.refill(PageIndex(2), false), Some(Stop::NoMemory));
    pool.add(2);
    assert_eq!(bring(&mut installer, &mut table, 1, 8), None);
    assert_eq!(installer.refill(PageIndex(2), false), None);
    assert_eq!(table.state(PageIndex(1)), Some(PageState::PresentPush));
    assert_eq!([0, HUGE, 2 * HUGE].map(|at| memory.byte(at)), [Some(7), Some(8), Some(0)]);
}

#[test]
fn huge_page_that_a_dead_pager_installed_counts_as_present() {
    let Some(_pool) = Pool::with_free(2) else { return };
    let Some(memory) = Memory::new(HUGE, 2, Backing::Memfd) else { return };
    let (mut installer, (mut table, _directory)) = (memory.installer(), table(&memory));
    memory.copy(1, 9);
    assert_eq!(bring(&mut installer, &mut table, 1, 3), None);
    assert_eq!((table.state(PageIndex(1)), memory.byte(HUGE)), (Some(PageState::PresentPush), Some(9)));
}

#[test]
fn small_page_that_a_dead_pager_copied_counts_as_present() {
    let Some(memory) = Memory::new(PAGE_SIZE, 4, Backing::Anonymous) else { return };
    let (installer, (mut table, _directory)) = (memory.installer(), table(&memory));
    memory.copy(1, 9);
    let pages = PageRun { region: 0, page: 0, count: 4 };
    let mut claim = installer.claim(&mut table, pages, LaneKind::Bulk).unwrap();
    assert_eq!(claim.install(&[5; 4 * PAGE_SIZE as usize]), None);
    assert_eq!([0, PAGE_SIZE, 2 * PAGE_SIZE].map(|at| memory.byte(at)), [Some(5), Some(9), Some(5)]);
}

#[test]
fn page_that_a_file_holds_and_nobody_mapped_is_not_the_page_that_came() {
    let Some(mut memory) = Memory::new(PAGE_SIZE, 4, Backing::Memfd) else { return };
    let file = memory.file.take().map(fs::File::from).unwrap();
    file.write_all_at(&[9; 16], PAGE_SIZE).unwrap();
    let (installer, (mut table, _directory)) = (memory.installer(), table(&memory));
    let pages = PageRun { region: 0, page: 0, count: 4 };
    let mut claim = installer.claim(&mut table, pages, LaneKind::Bulk).unwrap();
    assert_eq!(claim.install(&[5; 4 * PAGE_SIZE as usize]), Some(Stop::Refused(libc::EEXIST)));
    assert_eq!(claim.arrived().collect::<Vec<_>>(), [(PageIndex(0), PageIndex(1))]);
}

fn visible(page: u64) -> [MemoryError; 1] {
    [MemoryError { gpa: page * PAGE_SIZE, lsb: 12, guest_visible: true, ..MemoryError::default() }]
}

/// Page 0 has come, full of sevens.
fn with_a_page(memory: &Memory) -> (Resolver, tempfile::TempDir) {
    let (mut resolver, directory) = memory.resolver();
    let pages = PageRun { region: 0, page: 0, count: 1 };
    let mut claim = resolver.claim(pages, LaneKind::Bulk).unwrap();
    assert_eq!(claim.write(&[7; PAGE_SIZE as usize]), None);
    resolver.mark_arrived(&claim);
    assert_eq!(claim.install(&[7; PAGE_SIZE as usize]), None);
    resolver.finish_claim(&claim);
    assert_eq!(memory.byte(0), Some(7));
    (resolver, directory)
}

#[test]
fn visible_error_of_a_page_of_a_file_that_is_here_takes_the_page_away() {
    let Some(memory) = Memory::new(PAGE_SIZE, 4, Backing::Memfd) else { return };
    let (mut resolver, _directory) = with_a_page(&memory);
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.marked, reply.unmarked), (1, 0));
    assert_eq!(memory.byte(0), None);
}

#[test]
fn visible_error_of_a_copied_page_gets_its_marker_once_the_guest_gives_the_page_back() {
    let Some(memory) = Memory::new(PAGE_SIZE, 4, Backing::Anonymous) else { return };
    let (mut resolver, _directory) = with_a_page(&memory);
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.marked, reply.unmarked, memory.byte(0)), (1, 1, Some(7)));
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.already, reply.unmarked), (1, 1));
    memory.memory.discard(0);
    resolver.discard(memory.memory.hva(), Hva(memory.memory.at(PAGE_SIZE)));
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.already, reply.unmarked, memory.byte(0)), (1, 0, None));
}

#[test]
fn visible_error_of_a_page_that_was_given_back_and_used_again_takes_it_away() {
    let Some(memory) = Memory::new(PAGE_SIZE, 4, Backing::Memfd) else { return };
    let (mut resolver, _directory) = with_a_page(&memory);
    resolver.discard(memory.memory.hva(), Hva(memory.memory.at(PAGE_SIZE)));
    memory.installer().refill(PageIndex(0), false);
    assert_eq!(memory.byte(0), Some(7), "the mapping was never dropped here: it is as if the guest had used it again");
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.marked, memory.byte(0)), (1, None));
}

#[test]
fn visible_error_after_the_end_leaves_no_moment_of_zeros() {
    let Some(memory) = Memory::new(PAGE_SIZE, 1, Backing::Memfd) else { return };
    let (mut resolver, _directory) = with_a_page(&memory);
    assert_eq!(resolver.complete().unwrap(), 0);
    let reply = resolver.mark_poisoned(&visible(0));
    assert_eq!((reply.marked, memory.byte(0)), (1, None));
}
