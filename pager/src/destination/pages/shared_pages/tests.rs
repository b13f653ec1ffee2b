mod bad_frames;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use vmferry_patience::patient;

use super::*;
use crate::destination::lanes::receiver::{LaneReceiver, Step};
use crate::destination::memory::installer::{Installer, RegionBacking};
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::destination::page_table::PageState::{Absent, PresentDemand};
use crate::destination::page_table::{PageState, PageTable};
use crate::destination::pages::resolver::FaultOutcome;
use crate::event_log::EventLog;
use crate::lane::frame::{FrameHeader, FrameKind};
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::{AddressMap, PageIndex, PageNumbering};
use crate::layout::page_run::LaneKind;
use crate::layout::{Backing, Gpa, Hva, MemoryLayout, Region};
use crate::proto::{ErrorOrigin, MemoryError};
use crate::sys::iovecs::IoVecs;
use crate::sys::memfd::{memfd, punch_hole};
use crate::sys::procfs::process_started;
use crate::sys::testing::{TestMemory, byte_at};
use crate::sys::uffd_probe::probe;
use crate::sys::userfaultfd::{UffdEvent, Userfaultfd, feature};
use crate::vmm::attached_memory::AttachedFile;

const PAGES: u64 = 8;
const BYTES: usize = (PAGES * PAGE_SIZE) as usize;

/// Memory of this process, and a file whose pages are ready to be received into. Dropped before its page table.
struct Guest {
    memory: TestMemory,
    shared: SharedPages,
    file: std::fs::File,
    elsewhere: Vec<u8>,
    iovecs: IoVecs,
    uffd: Arc<Userfaultfd>,
    _directory: tempfile::TempDir,
}

impl Guest {
    /// Skipped, with the reason printed, where the kernel does not permit it.
    fn new() -> Option<Self> {
        Self::of(true)
    }

    /// The same, but pages are copied, as if the file were not known.
    fn copied() -> Option<Self> {
        Self::of(false)
    }

    fn of(is_known: bool) -> Option<Self> {
        let features = feature::POISON | feature::MISSING_SHMEM | feature::MINOR_SHMEM;
        if let Err(reason) = probe(features) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let fd = memfd("guest", PAGES * PAGE_SIZE).unwrap();
        let file = std::fs::File::from(fd.try_clone().unwrap());
        let memory = TestMemory::of_file(&fd, 0, BYTES as u64);
        let uffd = Userfaultfd::create().unwrap();
        uffd.enable(features).unwrap();
        uffd.register(memory.hva(), PAGES * PAGE_SIZE).unwrap();
        let region = Region { gpa: Gpa(0), size: PAGES * PAGE_SIZE, page_size: PAGE_SIZE, backing: Backing::Memfd };
        let layout = MemoryLayout::new(vec![region]).unwrap();
        let numbering = PageNumbering::new(&layout);
        let address_map = AddressMap::new(numbering.clone(), vec![memory.hva()]).unwrap();
        let attached = is_known.then_some(AttachedFile { fd, offset: 0 });
        let receive_mapping = attached.as_ref().map(|attached| {
            let mut receive_mapping = ReceiveMapping::new(attached, PAGES * PAGE_SIZE).unwrap();
            receive_mapping.prepare(0, PAGES).unwrap();
            receive_mapping
        });
        let uffd = Arc::new(uffd);
        let backing = RegionBacking { uffd: uffd.clone(), file: attached };
        let installer = Installer::new(address_map, vec![backing], std::process::id(), true).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (table, _) = PageTable::open(&directory.path().join("pages"), &layout).unwrap();
        let mut resolver = Resolver::new(numbering, table, EventLog::default());
        let pid = std::process::id();
        resolver.attach(pid, process_started(pid), installer, None).unwrap();
        resolver.set_receive_mappings(vec![receive_mapping]);
        let (elsewhere, iovecs) = (vec![0; BYTES], IoVecs::default());
        Some(Self { shared: SharedPages::new(resolver), memory, file, elsewhere, iovecs, uffd, _directory: directory })
    }

    fn claim(&self, page: u64, count: u64) -> Claim {
        let pages = PageRun { region: 0, page, count };
        self.shared.lock().claim_in_place(pages, LaneKind::Bulk).unwrap()
    }

    /// Receives the pages of a claim, full of this byte.
    fn receive(&mut self, claim: &Claim, byte: u8) {
        let (from, to) = claim.range();
        let bytes = vec![byte; ((to.0 - from.0) * PAGE_SIZE) as usize];
        let (mut source, lane) = UnixStream::pair().unwrap();
        source.write_all(&bytes).unwrap();
        let mut places = self.iovecs.start();
        assert!(claim.add_places(&mut self.elsewhere, &mut places));
        assert_eq!(places.receive(&lane).unwrap(), bytes.len());
    }

    fn install(&self, mut claim: Claim) {
        assert_eq!(self.shared.install(&mut claim, &[]), None);
    }

    fn give_back(&self, page: u64) {
        give_back(&self.shared, self.memory.at(page * PAGE_SIZE));
    }

    fn states(&self) -> Vec<PageState> {
        let resolver = self.shared.lock();
        (0..PAGES).map(|page| resolver.table().state(PageIndex(page)).unwrap()).collect()
    }

    /// The page is not in the file any more.
    fn punch(&self, page: u64) {
        punch_hole(&self.file, page * PAGE_SIZE, PAGE_SIZE).unwrap();
    }

    /// Address, thread, and whether the file holds the page.
    fn next_fault(&self) -> (Hva, u32, bool) {
        let until = Instant::now() + patient(10.0);
        loop {
            if let Some(UffdEvent::Fault { at, thread, minor }) = self.uffd.read_events().unwrap().pop() {
                return (at, thread, minor);
            }
            assert!(Instant::now() < until, "nobody faults");
        }
    }

    /// The first byte of a page that is installed; `None`: it is poison.
    fn byte(&self, page: u64) -> Option<u8> {
        self.memory.byte(page * PAGE_SIZE)
    }
}

fn give_back(shared: &SharedPages, at: u64) {
    shared.with_no_install_in_flight(|resolver| resolver.discard(Hva(at), Hva(at + PAGE_SIZE)));
}

#[test]
fn unwanted_pages_of_a_frame_change_nothing() {
    use PageState::{Absent, Discarded, Installing, PresentPush};
    let Some(mut guest) = Guest::new() else { return };
    let claim = guest.claim(3, 1);
    guest.receive(&claim, 7);
    guest.install(claim);
    guest.give_back(5);
    let claim = guest.claim(2, 5);
    let claimed = [Absent, Absent, Installing, PresentPush, Installing, Discarded, Installing, Absent];
    assert_eq!(guest.states(), claimed);
    guest.receive(&claim, 9);
    guest.install(claim);
    assert_eq!([2, 3, 4, 6].map(|page| guest.byte(page)), [Some(9), Some(7), Some(9), Some(9)]);
    let mut gone = [1; 16];
    guest.file.read_exact_at(&mut gone, 5 * PAGE_SIZE).unwrap();
    assert_eq!(gone, [0; 16]);
    assert_eq!(guest.states()[2..7], [PresentPush, PresentPush, PresentPush, Discarded, PresentPush]);
}

/// Starts `what` while a frame of pages 0 to 3 is on its way, which comes with 9s. It must not have happened before then.
fn behind_a_frame<T: Send>(guest: &mut Guest, what: impl FnOnce(&SharedPages) -> T + Send) -> T {
    let claim = guest.claim(0, 4);
    guest.receive(&claim, 9);
    let (shared, happened) = (&guest.shared, &AtomicBool::new(false));
    std::thread::scope(|scope| {
        let install_guard = shared.install_guard();
        let thread = scope.spawn(move || {
            let done = what(shared);
            happened.store(true, Ordering::SeqCst);
            done
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!happened.load(Ordering::SeqCst));
        guest.install(claim);
        drop(install_guard);
        thread.join().unwrap()
    })
}

#[test]
fn a_page_that_is_found_bad_at_the_source_while_it_is_received_has_come() {
    let Some(mut guest) = Guest::new() else { return };
    let error = MemoryError { gpa: PAGE_SIZE, lsb: 12, ..MemoryError::default() };
    let reply = behind_a_frame(&mut guest, |shared| {
        shared.with_no_install_in_flight(|resolver| resolver.mark_poisoned(&[error]))
    });
    assert_eq!((reply.healed, guest.byte(1)), (1, Some(9)));
}

#[test]
fn page_known_bad_to_the_guest_is_poison_after_its_frame_and_loses_its_bytes() {
    let Some(mut guest) = Guest::new() else { return };
    let note = PoisonInfo { origin: ErrorOrigin::Read, guest_visible: true, hop: 0 };
    let stop = behind_a_frame(&mut guest, |shared| shared.poison(PageRun { region: 0, page: 1, count: 1 }, note));
    assert_eq!((stop, guest.states()[1]), (None, PageState::PoisonedTold));
    let mut gone = [1; 16];
    guest.file.read_exact_at(&mut gone, PAGE_SIZE).unwrap();
    assert_eq!(gone, [0; 16]);
    assert_eq!([0, 1, 2, 3].map(|page| guest.byte(page)), [Some(9), None, Some(9), Some(9)]);
}

#[test]
fn a_page_is_not_found_bad_between_its_coming_and_its_mapping() {
    let Some(mut guest) = Guest::new() else { return };
    let mut claim = guest.claim(0, 1);
    guest.receive(&claim, 9);
    let pages = PageRun { region: 0, page: 0, count: 1 };
    assert_eq!(claim.write(&[]), None);
    guest.shared.lock().mark_arrived(&claim);
    assert_eq!((guest.states()[0], guest.shared.lock().is_claimed(pages)), (PageState::PresentPush, true));
    assert_eq!(claim.install(&[]), None);
    guest.shared.lock().finish_claim(&claim);
    assert!(!guest.shared.lock().is_claimed(pages));
}

#[test]
fn a_bad_page_does_not_wait_for_a_frame_of_others() {
    let Some(mut guest) = Guest::new() else { return };
    let claim = guest.claim(0, 4);
    guest.receive(&claim, 9);
    let _on_its_way = guest.shared.install_guard();
    let note = PoisonInfo { origin: ErrorOrigin::Read, guest_visible: false, hop: 0 };
    assert_eq!(guest.shared.poison(PageRun { region: 0, page: 4, count: 2 }, note), None);
    assert!(guest.states()[4..6].iter().all(|state| state.is_poisoned()));
    guest.install(claim);
}

#[test]
fn a_page_of_which_nothing_came_is_absent_again() {
    let Some(mut guest) = Guest::new() else { return };
    let claim = guest.claim(0, PAGES);
    guest.receive(&claim, 9);
    guest.shared.lock().finish_claim(&claim);
    assert_eq!(guest.states(), [Absent; PAGES as usize]);
    let claim = guest.claim(0, PAGES);
    guest.receive(&claim, 8);
    guest.install(claim);
    assert_eq!((guest.byte(2), guest.byte(7)), (Some(8), Some(8)));
}

#[test]
fn a_page_that_cannot_be_mapped_is_reported_and_stops_no_other() {
    let Some(mut guest) = Guest::new() else { return };
    let mut claim = guest.claim(0, PAGES);
    guest.receive(&claim, 9);
    guest.punch(3);
    assert_eq!(guest.shared.install(&mut claim, &[]), Some(Stop::Refused(libc::EFAULT)));
    assert_eq!((claim.handled(), guest.states()), (PAGES, vec![PageState::PresentPush; PAGES as usize]));
    assert_eq!((guest.byte(2), guest.byte(4), guest.byte(7)), (Some(9), Some(9), Some(9)));
}

/// Installs page 0, full of 9s, while the lock is held, and reads it on another thread. Returns whether the reader had it
/// before the lock was released, within `time`.
fn seen_while_locked(guest: &Guest, mut claim: Claim, time: Duration) -> bool {
    let (shared, at) = (&guest.shared, guest.memory.at(0));
    let reader = std::thread::spawn(move || byte_at(at));
    let seen = std::thread::scope(|scope| {
        let held = shared.lock();
        scope.spawn(move || assert_eq!(shared.install(&mut claim, &[9; PAGE_SIZE as usize]), None));
        let until = Instant::now() + time;
        while !reader.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seen = reader.is_finished();
        drop(held);
        seen
    });
    assert_eq!(reader.join().unwrap(), Some(9));
    seen
}

#[test]
fn a_page_of_a_file_is_present_before_the_guest_can_see_it() {
    let Some(mut guest) = Guest::new() else { return };
    let claim = guest.claim(0, 1);
    guest.receive(&claim, 9);
    assert!(!seen_while_locked(&guest, claim, Duration::from_millis(50)));
}

#[test]
fn a_page_is_copied_while_another_thread_holds_the_lock() {
    let Some(guest) = Guest::copied() else { return };
    let claim = guest.shared.lock().claim(PageRun { region: 0, page: 0, count: 1 }, LaneKind::Bulk).unwrap();
    assert!(seen_while_locked(&guest, claim, patient(10.0)));
}

#[test]
fn repeated_fault_on_a_page_installed_before_its_claim_is_finished_is_woken() {
    let Some(guest) = Guest::copied() else { return };
    let page = PageIndex(2);
    let mut claim = guest.shared.lock().claim(PageRun { region: 0, page: 2, count: 1 }, LaneKind::Bulk).unwrap();
    assert_eq!(claim.install(&[9; PAGE_SIZE as usize]), None);
    assert_eq!(guest.byte(2), Some(9));
    guest.punch(2);
    let at = guest.memory.at(2 * PAGE_SIZE);
    let reader = std::thread::spawn(move || byte_at(at));
    let (hva, thread, minor) = guest.next_fault();
    assert_eq!(guest.shared.lock().fault(hva, thread, minor), FaultOutcome::Ask(page));
    assert_eq!(guest.shared.lock().ask(page), None);
    guest.shared.lock().finish_claim(&claim);
    let (hva, thread, minor) = guest.next_fault();
    assert_eq!(guest.shared.lock().fault(hva, thread, minor), FaultOutcome::Resolved);
    assert_eq!(reader.join().unwrap(), Some(0));
}

/// The two ends of a lane.
fn lane(lane: LaneKind) -> (TcpStream, LaneReceiver) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    source.set_nodelay(true).unwrap();
    (source, LaneReceiver::new(listener.accept().unwrap().0, lane))
}

/// A frame of one page, full of its number.
fn frame(page: u64) -> Vec<u8> {
    let header = FrameHeader { kind: FrameKind::Data, region: 0, page, count: 1 };
    [header.encode().as_slice(), &[page as u8; PAGE_SIZE as usize]].concat()
}

/// Steps until a step finds something.
fn take(receiver: &mut LaneReceiver, shared: &SharedPages) {
    let until = Instant::now() + patient(10.0);
    while matches!(receiver.step(shared), Step::Nothing) {
        assert!(Instant::now() < until, "nothing comes");
    }
}

#[test]
fn an_answer_is_received_with_its_header_and_put_where_its_page_belongs() {
    let Some(guest) = Guest::new() else { return };
    let (mut source, mut receiver) = lane(LaneKind::Urgent);
    for page in [5, 2] {
        source.write_all(&frame(page)).unwrap();
        take(&mut receiver, &guest.shared);
        let mut written = [0; PAGE_SIZE as usize];
        guest.file.read_exact_at(&mut written, page * PAGE_SIZE).unwrap();
        assert_eq!((guest.byte(page), receiver.has_more()), (Some(page as u8), false));
        assert_eq!(written, [page as u8; PAGE_SIZE as usize]);
    }
    assert_eq!(guest.states()[2..6], [PresentDemand, Absent, Absent, PresentDemand]);
}

#[test]
fn an_answer_that_comes_in_parts_is_installed_when_it_is_whole() {
    let Some(guest) = Guest::new() else { return };
    let (mut source, mut receiver) = lane(LaneKind::Urgent);
    let whole = frame(3);
    for part in [&whole[..10], &whole[10..24], &whole[24..2000]] {
        source.write_all(part).unwrap();
        while !matches!(receiver.step(&guest.shared), Step::Nothing) {}
        assert_eq!(guest.states(), [Absent; PAGES as usize]);
    }
    source.write_all(&whole[2000..]).unwrap();
    while guest.states()[3] == Absent {
        take(&mut receiver, &guest.shared);
    }
    assert_eq!(guest.byte(3), Some(3));
    source.write_all(&frame(4)).unwrap();
    take(&mut receiver, &guest.shared);
    assert_eq!(guest.byte(4), Some(4));
}

#[test]
fn the_guest_gives_nothing_back_while_a_frame_is_on_its_way() {
    let Some(mut guest) = Guest::new() else { return };
    let at = guest.memory.at(PAGE_SIZE);
    behind_a_frame(&mut guest, |shared| give_back(shared, at));
    assert_eq!(guest.states()[..3], [PageState::PresentPush, PageState::Discarded, PageState::PresentPush]);
}
