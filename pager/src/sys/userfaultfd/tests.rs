//! Against the real kernel; skipped, with the reason printed, where it does not permit a userfaultfd.

use super::*;
use crate::sys::memfd::memfd;
use crate::sys::uffd_probe::probe;

const PAGE: u64 = 4096;

/// Private anonymous pages of this process, registered.
struct Mapped {
    base: u64,
    pages: u64,
    uffd: Userfaultfd,
}

impl Mapped {
    fn new(pages: u64) -> Option<Self> {
        let features = feature::POISON | feature::EVENT_REMOVE | feature::THREAD_ID;
        if let Err(reason) = probe(features) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let uffd = Userfaultfd::create().unwrap();
        uffd.enable(features).unwrap();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), (pages * PAGE) as usize, protection, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let base = base as u64;
        uffd.register(Hva(base), pages * PAGE).unwrap();
        Some(Self { base, pages, uffd })
    }

    fn at(&self, page: u64) -> Hva {
        Hva(self.base + page * PAGE)
    }

    fn byte(&self, page: u64) -> u8 {
        // SAFETY: callers read installed pages only.
        unsafe { std::ptr::read_volatile(self.at(page).0 as *const u8) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(self.base as *mut libc::c_void, (self.pages * PAGE) as usize) };
    }
}

fn done(bytes: u64) -> Progress {
    Progress { done: bytes, stop: None }
}

fn stopped(bytes: u64, stop: Stop) -> Progress {
    Progress { done: bytes, stop: Some(stop) }
}

#[test]
fn a_copy_fills_the_range_and_says_eexist_afterwards() {
    let Some(m) = Mapped::new(4) else { return };
    assert_eq!(m.uffd.copy(m.at(0), &[7; 8192]), done(8192));
    assert_eq!((m.byte(0), m.byte(1)), (7, 7));
    assert_eq!(m.uffd.copy(m.at(0), &[8; 4096]), stopped(0, Stop::AlreadyPresent));
    assert_eq!(m.byte(0), 7);
}

#[test]
fn a_range_stops_at_the_page_that_is_present_and_says_how_far_it_came() {
    let Some(m) = Mapped::new(4) else { return };
    assert_eq!(m.uffd.copy(m.at(2), &[1; 4096]), done(PAGE));
    assert_eq!(m.uffd.copy(m.at(0), &[2; 16384]), stopped(2 * PAGE, Stop::AlreadyPresent));
    assert_eq!(m.uffd.zeropage(m.at(3), PAGE), done(PAGE));
    assert_eq!(m.byte(3), 0);
    assert_eq!(m.uffd.zeropage(m.at(3), PAGE), stopped(0, Stop::AlreadyPresent));
}

#[test]
fn poison_stops_at_present_pages_and_markers() {
    let Some(m) = Mapped::new(4) else { return };
    assert_eq!(m.uffd.copy(m.at(1), &[1; 4096]), done(PAGE));
    assert_eq!(m.uffd.poison(m.at(0), 4 * PAGE), stopped(PAGE, Stop::AlreadyPresent));
    assert_eq!(m.uffd.poison(m.at(2), 2 * PAGE), done(2 * PAGE));
    assert_eq!(m.uffd.poison(m.at(2), PAGE), stopped(0, Stop::AlreadyPresent));
}

/// Why COPY is issued for claimed pages only.
#[test]
fn a_copy_over_a_marker_unpoisons() {
    let Some(m) = Mapped::new(1) else { return };
    assert_eq!(m.uffd.poison(m.at(0), PAGE), done(PAGE));
    assert_eq!(m.uffd.copy(m.at(0), &[9; 4096]), done(PAGE));
    assert_eq!(m.byte(0), 9);
}

#[test]
fn an_unregistered_range_is_enoent_and_a_bad_one_refused() {
    let Some(m) = Mapped::new(2) else { return };
    m.uffd.unregister(m.at(1), PAGE).unwrap();
    assert_eq!(m.uffd.copy(m.at(1), &[1; 4096]), stopped(0, Stop::NotRegistered));
    assert_eq!(m.uffd.poison(Hva(m.base + 1), PAGE), stopped(0, Stop::Refused(libc::EINVAL)));
}

#[test]
fn a_process_that_is_gone_is_esrch() {
    let Some(m) = Mapped::new(1) else { return };
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // SAFETY: the child makes system calls only, then leaves without running destructors.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(ours);
        let sent = Userfaultfd::create().and_then(|uffd| {
            uffd.enable(0)?;
            crate::sys::fd_passing::send(&theirs, b"u", &[uffd.as_fd()])
        });
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(sent.is_err())) };
    }
    assert!(child > 0);
    drop(theirs);
    let received = crate::sys::fd_passing::receive(&ours, &mut [0; 8]).unwrap();
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    let uffd = Userfaultfd::adopt(received.descriptors.into_iter().next().unwrap()).unwrap();
    assert_eq!(uffd.copy(m.at(0), &[1; 4096]), stopped(0, Stop::ProcessGone));
}

#[test]
fn a_fault_names_its_address_and_thread_and_ends_with_the_copy() {
    let Some(m) = Mapped::new(1) else { return };
    let at = m.base + 0x123;
    let toucher = std::thread::spawn(move || {
        // SAFETY: the page is mapped for the life of the test; the read waits for the copy below.
        let byte = unsafe { std::ptr::read_volatile(at as *const u8) };
        // SAFETY: takes nothing.
        (unsafe { libc::gettid() }, byte)
    });
    let event = next_event(&m.uffd);
    assert_eq!(m.uffd.copy(m.at(0), &[5; 4096]), done(PAGE));
    let (thread, byte) = toucher.join().unwrap();
    assert_eq!(byte, 5);
    let UffdEvent::Fault { at: found, thread: tid, minor: false } = event else { panic!("{event:?}") };
    assert_eq!(found.0 & !0xfff, m.base);
    assert_eq!(tid, thread as u32);
}

#[test]
fn a_remove_is_told_and_copy_is_eagain_until_it_is_read() {
    let Some(m) = Mapped::new(2) else { return };
    assert_eq!(m.uffd.copy(m.at(0), &[5; 4096]), done(PAGE));
    let base = m.base;
    let balloon = std::thread::spawn(move || {
        // SAFETY: drops the first page of the test's own mapping.
        unsafe { libc::madvise(base as *mut libc::c_void, PAGE as usize, libc::MADV_DONTNEED) }
    });
    wait_readable(&m.uffd);
    assert_eq!(m.uffd.copy(m.at(1), &[1; 4096]), stopped(0, Stop::Changing));
    assert_eq!(next_event(&m.uffd), UffdEvent::Remove { start: m.at(0), end: m.at(1) });
    assert_eq!(balloon.join().unwrap(), 0);
    assert_eq!(m.uffd.copy(m.at(1), &[1; 4096]), done(PAGE));
}

#[test]
fn only_a_userfaultfd_is_adopted() {
    let file = memfd("no-uffd", PAGE).unwrap();
    assert_eq!(Userfaultfd::adopt(file).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

fn wait_readable(uffd: &Userfaultfd) {
    let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, 20 seconds.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 20_000) }, 1, "no event");
}

fn next_event(uffd: &Userfaultfd) -> UffdEvent {
    wait_readable(uffd);
    uffd.read_events().unwrap().into_iter().next().unwrap()
}
