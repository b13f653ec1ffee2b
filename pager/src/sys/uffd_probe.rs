//! Finds out whether this kernel serves a destination.

use std::io;

use crate::layout::{Hva, PAGE_SIZE};
use crate::sys::userfaultfd::{Stop, Userfaultfd, feature};

/// A lack of this kernel.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It permits no userfaultfd.
    #[error("no userfaultfd for kernel-mode faults: {0}")]
    NoUserfaultfd(#[source] io::Error),
    /// It refuses the handshake.
    #[error("UFFDIO_API with {features:#x}: {source}")]
    Api {
        /// The features requested.
        features: u64,
        /// The error of the call.
        source: io::Error,
    },
    /// It has not all features.
    #[error("this kernel lacks {}; UFFDIO_POISON came with Linux 6.6", .0.join(", "))]
    Features(Vec<&'static str>),
    /// No page can be mapped.
    #[error("mmap: {0}")]
    Map(#[source] io::Error),
    /// No page can be registered.
    #[error("UFFDIO_REGISTER: {0}")]
    Register(#[source] io::Error),
    /// No page can be poisoned.
    #[error("UFFDIO_POISON failed: {0:?}")]
    Poison(Stop),
}

/// Checks that this kernel serves a destination: it has the features, and a POISON succeeds.
///
/// # Errors
/// [`ProbeError`].
pub fn probe(features: u64) -> Result<(), ProbeError> {
    let open = || Userfaultfd::create().map_err(ProbeError::NoUserfaultfd);
    let enable =
        |uffd: &Userfaultfd, features| uffd.enable(features).map_err(|source| ProbeError::Api { features, source });
    let known = enable(&open()?, 0)?;
    let missing: Vec<_> =
        feature::NAMES.iter().filter(|(bit, _)| features & bit & !known != 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(ProbeError::Features(missing));
    }
    // Dropped behind the userfaultfd: while that is open, munmap waits for a reader of its event.
    let page = ScratchPage::new().map_err(ProbeError::Map)?;
    let uffd = open()?;
    enable(&uffd, features)?;
    uffd.register(page.0, PAGE_SIZE).map_err(ProbeError::Register)?;
    uffd.poison(page.0, PAGE_SIZE).stop.map_or(Ok(()), |stop| Err(ProbeError::Poison(stop)))
}

/// One private anonymous page, unmapped when dropped.
struct ScratchPage(Hva);

impl ScratchPage {
    fn new() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new private mapping; no existing one is replaced.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(Hva(base as u64))) }
    }
}

impl Drop for ScratchPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; nobody keeps a pointer to it.
        unsafe { libc::munmap(self.0.0 as *mut libc::c_void, 4096) };
    }
}
