//! Pages that a file has in memory: cachestat(2), Linux 6.5. Of a tmpfs they are its contents.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// System call number on x86-64, not in libc yet.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat`.
#[repr(C)]
#[derive(Debug, Default)]
struct CacheStat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Counts the pages of a range of a tmpfs file, in memory or in swap. SEEK_DATA would not do: it takes pages that
/// fallocate(2) made for a hole, but a userfaultfd takes them for present.
///
/// `None`: the kernel does not count them. It has no such call, a service's seccomp filter does not know it, or the file
/// is of a hugetlbfs.
///
/// # Errors
/// The kernel refuses for another reason.
pub fn pages(file: &File, offset: u64, size: u64) -> io::Result<Option<u64>> {
    let range = [offset, size];
    let mut stat = CacheStat::default();
    // SAFETY: the range is two 64-bit words, the answer five; both live.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), &raw mut stat, 0) };
    if result == 0 {
        return Ok(Some(stat.cache + stat.evicted));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)) => Ok(None),
        error => Err(error),
    }
}
