//! Makes a memory error at a page of the guest, as a failing DIMM would.
//!
//! Where the kernel has `CONFIG_MEMORY_FAILURE` the frame itself is poisoned (`MADV_HWPOISON`); elsewhere the page is
//! dropped and a poison marker put in its place (`UFFDIO_POISON`), which to guest and readers is the same.
//!
//! Between drop and marker nobody may see the page as zeros. Without a migration the page is registered with a
//! userfaultfd of the injector's own for that moment: whoever touches it (the pager of a source reads at any time) waits
//! and then finds the marker. While a migration's userfaultfd owns the range (EBUSY) that one is used; the pager serves its
//! faults, so the vCPUs must stand still, which the caller sees to in either case.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::layout::PAGE_SIZE;
use crate::userfaultfd::{FEATURE_MINOR_SHMEM, FEATURE_POISON, MODE_MINOR, MODE_MISSING, Poisoned, Userfaultfd};

/// How often a page that was touched between drop and marker is dropped again. Every try gives the other side a chance
/// to be faster; hundreds in a row do not happen.
const TRIES: u32 = 1000;

/// Why there is no memory error at the page.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// A destination's page that is not here yet.
    #[error("page {gpa:#x} has not arrived yet: make the memory error on the source, or later")]
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
        /// What was tried.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn kernel(what: &'static str) -> impl FnOnce(io::Error) -> InjectError {
    move |source| InjectError::Kernel { what, source }
}

/// Makes the page at `hva` (page-aligned, in guest memory) raise a memory error from now on. The vCPUs stand still.
/// `migration` is the userfaultfd of a destination while the VMM keeps it.
///
/// May block until the pager has read a REMOVE event: never call it in a thread that the pager waits for.
///
/// # Errors
/// [`InjectError`]; the page is then as before, or dropped and marked.
pub fn memory_error(gpa: u64, hva: u64, shared: bool, migration: Option<&Userfaultfd>) -> Result<(), InjectError> {
    let can_minor = Userfaultfd::kernel_features().map_err(kernel("userfaultfd"))? & FEATURE_MINOR_SHMEM;
    let minor = shared && can_minor != 0;
    let features = FEATURE_POISON | if minor { FEATURE_MINOR_SHMEM } else { 0 };
    let own = Userfaultfd::new(features).map_err(kernel("userfaultfd with UFFD_FEATURE_POISON (Linux 6.6)"))?;
    match own.register(hva, PAGE_SIZE, MODE_MISSING | if minor { MODE_MINOR } else { 0 }) {
        Ok(()) => {
            let done = drop_and_mark(&own, gpa, hva);
            own.unregister(hva, PAGE_SIZE).map_err(kernel("UFFDIO_UNREGISTER"))?;
            done
        }
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let Some(migration) = migration else { return Err(kernel("UFFDIO_REGISTER")(error)) };
            if !is_present(hva)? {
                return Err(InjectError::NotArrived { gpa });
            }
            drop_and_mark(migration, gpa, hva)
        }
        Err(error) => Err(kernel("UFFDIO_REGISTER")(error)),
    }
}

fn drop_and_mark(uffd: &Userfaultfd, gpa: u64, hva: u64) -> Result<(), InjectError> {
    if entry(hva)? == Entry::Marker || poison_frame(hva)? {
        return Ok(());
    }
    for _ in 0..TRIES {
        advise(hva, libc::MADV_DONTNEED).map_err(kernel("madvise(MADV_DONTNEED)"))?;
        loop {
            match uffd.poison(hva, PAGE_SIZE).map_err(kernel("UFFDIO_POISON"))? {
                Poisoned::Marked => return Ok(()),
                Poisoned::PagePresent => break,
                Poisoned::Again => std::thread::yield_now(),
            }
        }
    }
    Err(InjectError::Contended { gpa })
}

/// Poisons the frame of a page that is present; false where this kernel cannot or this process may not.
fn poison_frame(hva: u64) -> Result<bool, InjectError> {
    if entry(hva)? != Entry::Present {
        return Ok(false);
    }
    match advise(hva, libc::MADV_HWPOISON) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => Ok(false),
        Err(error) => Err(kernel("madvise(MADV_HWPOISON)")(error)),
    }
}

fn advise(hva: u64, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: one page of guest memory, whose content the guest alone relies on and which is to be lost.
    if unsafe { libc::madvise(hva as *mut libc::c_void, PAGE_SIZE as usize, advice) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    None,
    Present,
    Swapped,
    /// A marker; on guest memory of ours only poison leaves one.
    Marker,
}

/// Whether the page's content is in this process, or it is poisoned already.
fn is_present(hva: u64) -> Result<bool, InjectError> {
    Ok(entry(hva)? != Entry::None)
}

/// What /proc/self/pagemap says of a page (Documentation/admin-guide/mm/pagemap.rst): bit 63 present, 62 swapped, bits
/// 0–4 the swap type; a marker is shown as the swap entry of the last type, `SWP_PTE_MARKER`.
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
