use super::*;
use crate::inject::{self, InjectError, Means};
use crate::layout::{Backing, split};
use crate::machine::{Block, KERNEL_BYTES};
use crate::memory::GuestMemory;
use crate::sigbus;

/// Memory with one bad page between two good ones, made twice over: the second error changes nothing.
fn bad_between_good(backing: Backing, means: Means) -> Result<(GuestMemory, u64), InjectError> {
    sigbus::install(sigbus::Accelerator::Process, takes_sigbus).unwrap();
    let memory = GuestMemory::new(&split(64 << 20, 1, backing).unwrap()).unwrap();
    let page = memory.regions()[0].hva + KERNEL_BYTES;
    for at in [page - 4096, page, page + 4096] {
        // SAFETY: inside the region.
        unsafe { (at as *mut u64).write_volatile(at) };
    }
    let bad = inject::Page { block: Block::page(KERNEL_BYTES), hva: page, shared: backing == Backing::Memfd };
    inject::memory_error(bad, means, None)?;
    Ok((memory, page))
}

fn only_the_page_is_bad(page: u64) {
    for _ in 0..3 {
        // SAFETY: mapped, and the handler is installed.
        let found = unsafe { [probe(page - 4096), probe(page), probe(page + 4096)] };
        assert_eq!(found, [Probed::Fine, Probed::Poisoned, Probed::Fine]);
    }
    // SAFETY: inside the region.
    assert_eq!(unsafe { ((page + 4096) as *const u64).read_volatile() }, page + 4096);
}

/// Also pins the ground of `inject`: the marker outlives the userfaultfd, in both backings, and neighbours are
/// kept.
#[test]
fn a_marker_is_caught_and_its_neighbours_are_not() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        match bad_between_good(backing, Means::Marker) {
            Ok((_memory, page)) => only_the_page_is_bad(page),
            Err(error) => return println!("SKIPPED: {error}"),
        }
    }
}

/// `MADV_HWPOISON` raises SIGBUS in this thread too: that one is passed over.
#[test]
fn a_bad_frame_is_caught_and_its_neighbours_are_not() {
    if std::env::var_os("VMFERRY_TEST_HWPOISON").is_none() {
        return println!("SKIPPED: it takes frames of the host out of service; VMFERRY_TEST_HWPOISON=1 runs it");
    }
    for backing in [Backing::Anonymous, Backing::Memfd] {
        for _ in 0..3 {
            let (_memory, page) = bad_between_good(backing, Means::Frame).unwrap();
            only_the_page_is_bad(page);
        }
    }
}

#[test]
fn a_page_without_a_frame_is_refused() {
    let memory = GuestMemory::new(&split(64 << 20, 1, Backing::Anonymous).unwrap()).unwrap();
    let hva = memory.regions()[0].hva;
    let page = inject::Page { block: Block::page(0), hva, shared: false };
    let refused = inject::memory_error(page, Means::Frame, None);
    assert!(matches!(refused, Err(InjectError::NotPresent { gpa: 0 })), "{refused:?}");
}
