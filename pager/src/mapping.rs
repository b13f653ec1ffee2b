//! A shared mapping of a region's file in this process, which is never touched by our own code: only the kernel reads and
//! writes it for us, so that a page that is bad or gone is an error of a call and no SIGBUS.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::lane::PAGE;

/// `MADV_POPULATE_WRITE`, Linux 5.14.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// The mapping; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    size: u64,
}

// SAFETY: an address range; every access is a system call.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// For probes.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read_only(file: &OwnedFd, offset: u64, size: u64) -> io::Result<Self> {
        Self::new(file, offset, size, libc::PROT_READ)
    }

    /// To receive into.
    ///
    /// # Errors
    /// What the kernel said; `EACCES` if the file was opened for reading only.
    pub fn writable(file: &OwnedFd, offset: u64, size: u64) -> io::Result<Self> {
        Self::new(file, offset, size, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn new(file: &OwnedFd, offset: u64, size: u64, protection: libc::c_int) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
        // SAFETY: a new shared mapping; no existing one is replaced.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size as usize, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), size })
    }

    /// Where byte `offset` is, for the kernel to write to. In the mapping as long as `offset` is.
    pub fn at(&self, offset: u64) -> *mut u8 {
        debug_assert!(offset < self.size);
        self.base.wrapping_add(offset as usize)
    }

    /// Makes the file hold the pages of a range, zeros where it held nothing, and maps them here.
    ///
    /// # Errors
    /// `ENOMEM`, `EFAULT` (no huge page free, or the file is too short), `EHWPOISON`.
    pub fn populate(&self, offset: u64, size: u64) -> io::Result<()> {
        // SAFETY: a range of this mapping; populating changes no contents.
        let done = unsafe { libc::madvise(self.at(offset).cast(), size as usize, MADV_POPULATE_WRITE) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Reads the first `N` bytes of consecutive pages of 4 KiB from `offset` on, as many as `into` has room for (at most
    /// 1024); returns of how many pages, which are fewer if one cannot be read.
    pub fn read_starts<const N: usize>(&self, offset: u64, into: &mut [u8]) -> usize {
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let start = |page: usize| {
            let at = self.at(offset + page as u64 * PAGE);
            libc::iovec { iov_base: at.cast(), iov_len: N }
        };
        let remote: Vec<libc::iovec> = (0..into.len() / N).map(start).collect();
        // SAFETY: takes nothing and cannot fail.
        let own = unsafe { libc::getpid() };
        // SAFETY: the kernel writes at most `into`, and reads this mapping for us.
        let n = unsafe { libc::process_vm_readv(own, &local, 1, remote.as_ptr(), remote.len() as u64, 0) };
        usize::try_from(n).unwrap_or(0) / N
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; nobody keeps an address of it.
        unsafe { libc::munmap(self.base.cast(), self.size as usize) };
    }
}
