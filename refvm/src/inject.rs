//! Makes a memory error at a page of the guest, as a failing DIMM would.
//!
//! [`Means::Marker`] drops the page and puts a poison marker in its place (`UFFDIO_POISON`). Guest and readers cannot tell
//! it from a bad frame, and the host loses nothing. [`Means::Frame`] poisons the frame itself (`MADV_HWPOISON`, which needs
//! `CONFIG_MEMORY_FAILURE` and `CAP_SYS_ADMIN`): the host keeps that frame out of service until it boots again.
//!
//! Between drop and marker nobody may see the page as zeros. Without a migration the page is registered with a
//! userfaultfd of the injector's own for that moment: a thread that touches it waits and then finds the marker. The
//! pager of a source reads at any time. While a migration's userfaultfd owns the range (EBUSY) that one is used; the
//! pager serves its faults, so the vCPUs must be stopped. The caller stops them in either case.
//!
//! A huge page goes bad as a whole: `UFFDIO_POISON` and `MADV_DONTNEED` take no part of one.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::layout::PAGE_SIZE;
use crate::machine::Block;
use crate::userfaultfd::{
    FEATURE_MINOR_HUGETLBFS, FEATURE_MINOR_SHMEM, FEATURE_POISON, MODE_MINOR, MODE_MISSING, PoisonOutcome, Userfaultfd,
};

/// How often a page that was touched between drop and marker is dropped again. Every try gives the other side a chance
/// to be faster; hundreds in a row do not happen.
const TRIES: u32 = 1000;

/// A page of guest memory, as large as its backing's pages are.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// The page in the guest.
    pub block: Block,
    /// Its first byte in this process.
    pub hva: u64,
    /// It is a memfd's.
    pub shared: bool,
}

impl Page {
    fn size(&self) -> u64 {
        self.block.size()
    }

    /// The feature that minor faults on it need; 0: there are none on private memory.
    fn minor_feature(&self) -> u64 {
        match (self.shared, self.size()) {
            (false, _) => 0,
            (true, PAGE_SIZE) => FEATURE_MINOR_SHMEM,
            (true, _) => FEATURE_MINOR_HUGETLBFS,
        }
    }
}

/// How the error is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Means {
    /// A poison marker in this mapping.
    #[default]
    Marker,
    /// The frame itself goes bad, for every process that maps it, until the host boots again.
    Frame,
}

/// Why there is no memory error at the page.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// There is no frame to poison.
    #[error("page {gpa:#x} is not present: only the frame of a page that is can be poisoned")]
    NotPresent {
        /// The page.
        gpa: u64,
    },
    /// A destination's page that is not here yet.
    #[error("page {gpa:#x} has not arrived yet, or is bad already: make the memory error on the source, or later")]
    NotArrived {
        /// The page.
        gpa: u64,
    },
    /// The page was touched again and again.
    #[error("page {gpa:#x} came back {TRIES} times between being dropped and being marked")]
    Contended {
        /// The page.
        gpa: u64,
    },
    /// The kernel refused.
    #[error("{what}: {source}")]
    Kernel {
        /// The failed operation.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> InjectError {
    move |source| InjectError::Kernel { what, source }
}

/// Makes the page raise a memory error from now on. The vCPUs are stopped. `migration` is the userfaultfd of a
/// destination while the VMM keeps it.
///
/// May block until the pager has read a REMOVE event: never call it in a thread that the pager waits for.
///
/// # Errors
/// [`InjectError`]; the page is then as before, or dropped and marked.
pub fn memory_error(page: Page, means: Means, migration: Option<&Userfaultfd>) -> Result<(), InjectError> {
    match means {
        Means::Marker => mark(page, migration),
        Means::Frame => poison_frame(page),
    }
}

fn mark(page: Page, migration: Option<&Userfaultfd>) -> Result<(), InjectError> {
    let minor = Userfaultfd::kernel_features().map_err(kernel("userfaultfd"))? & page.minor_feature();
    let own = Userfaultfd::new(FEATURE_POISON | minor);
    let own = own.map_err(kernel("userfaultfd with UFFD_FEATURE_POISON (Linux 6.6)"))?;
    match own.register(page.hva, page.size(), MODE_MISSING | if minor != 0 { MODE_MINOR } else { 0 }) {
        Ok(()) => {
            let done = drop_and_mark(&own, page);
            own.unregister(page.hva, page.size()).map_err(kernel("UFFDIO_UNREGISTER"))?;
            done
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let Some(migration) = migration else { return Err(kernel("UFFDIO_REGISTER")(error)) };
            if entry(page.hva)? == Entry::None {
                return Err(InjectError::NotArrived { gpa: page.block.gpa });
            }
            drop_and_mark(migration, page)
        }
        Err(error) => Err(kernel("UFFDIO_REGISTER")(error)),
    }
}

fn drop_and_mark(uffd: &Userfaultfd, page: Page) -> Result<(), InjectError> {
    if entry(page.hva)? == Entry::Marker {
        return Ok(());
    }
    for _ in 0..TRIES {
        advise(page, libc::MADV_DONTNEED).map_err(kernel("madvise(MADV_DONTNEED)"))?;
        loop {
            match uffd.poison(page.hva, page.size()).map_err(kernel("UFFDIO_POISON"))? {
                PoisonOutcome::Marked => return Ok(()),
                PoisonOutcome::PagePresent => break,
                PoisonOutcome::Again => std::thread::yield_now(),
            }
        }
    }
    Err(InjectError::Contended { gpa: page.block.gpa })
}

fn poison_frame(page: Page) -> Result<(), InjectError> {
    match entry(page.hva)? {
        Entry::Present => {}
        Entry::Marker => return Ok(()),
        Entry::None | Entry::Swapped => return Err(InjectError::NotPresent { gpa: page.block.gpa }),
    }
    POISONING.set((page.hva, page.size()));
    let done = advise(page, libc::MADV_HWPOISON);
    POISONING.set((0, 0));
    done.map_err(kernel("madvise(MADV_HWPOISON), which needs CONFIG_MEMORY_FAILURE and CAP_SYS_ADMIN"))
}

thread_local! {
    /// HVA and bytes that this thread poisons at the moment: `MADV_HWPOISON` raises SIGBUS in its caller.
    static POISONING: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

/// Whether a SIGBUS of the calling thread at that address comes from its own [`memory_error`]. Async-signal-safe.
pub(crate) fn raised_by_us(hva: u64) -> bool {
    let (start, size) = POISONING.get();
    hva.wrapping_sub(start) < size
}

fn advise(page: Page, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: one page of guest memory, whose content the guest alone relies on and which is to be lost.
    if unsafe { libc::madvise(page.hva as *mut libc::c_void, page.size() as usize, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    None,
    Present,
    /// Swapped out, or its frame is bad.
    Swapped,
    /// A marker; on guest memory of ours only poison leaves one.
    Marker,
}

/// The entry of a page in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst): bit 63 present, bit 62 swapped,
/// bits 0–4 the swap type. A marker of 4 KiB is a swap entry of the last type, `SWP_PTE_MARKER`. A marker of a huge page is
/// not shown.
fn entry(hva: u64) -> Result<Entry, InjectError> {
    let mut word = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|map| map.read_exact_at(&mut word, hva / PAGE_SIZE * 8))
        .map_err(kernel("/proc/self/pagemap"))?;
    let word = u64::from_ne_bytes(word);
    Ok(match (word >> 63 & 1, word >> 62 & 1) {
        (1, _) => Entry::Present,
        (_, 1) if word & 0x1f == 0x1f => Entry::Marker,
        (_, 1) => Entry::Swapped,
        _ => Entry::None,
    })
}
