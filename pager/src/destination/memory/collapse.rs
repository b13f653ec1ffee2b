//! Huge pages for memory that came in pieces of 4 KiB: `MADV_COLLAPSE` in the VMM, after the end.

use std::io;

use crate::layout::{HUGE_PAGE_SIZE, Hva};
use crate::sys::other_process;

/// Collapses what it can of a range of a process into huge pages; returns for how many bytes that was done. Parts that
/// cannot be (poisoned, swapped, no memory) stay as they are.
///
/// # Errors
/// The process is gone, or may not be advised (`EPERM`: process_madvise(2) wants `CAP_SYS_NICE` and `PTRACE_MODE_READ`),
/// or the kernel does not know how (`EINVAL`).
pub fn collapse(pid: u32, start: Hva, size: u64) -> io::Result<u64> {
    let process = other_process::open(pid)?;
    let (mut at, end) = (start.0.next_multiple_of(HUGE_PAGE_SIZE), (start.0 + size) / HUGE_PAGE_SIZE * HUGE_PAGE_SIZE);
    let mut done = 0;
    while at < end {
        match other_process::collapse(&process, Hva(at), HUGE_PAGE_SIZE) {
            Ok(()) => done += HUGE_PAGE_SIZE,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EPERM | libc::ENOSYS)) => {
                return Err(error);
            }
            // EAGAIN, EBUSY, ENOMEM: this one cannot be, now. EINVAL: a poisoned or registered part, or no such advice.
            Err(_) => {}
        }
        at += HUGE_PAGE_SIZE;
    }
    Ok(done)
}

/// Collapses each range and logs the outcome.
pub fn collapse_all(pid: u32, ranges: &[(Hva, u64)]) {
    for (start, size) in ranges {
        match collapse(pid, *start, *size) {
            Ok(bytes) => tracing::info!(hva = start.0, size, bytes, "pager.collapsed"),
            Err(error) => tracing::warn!(hva = start.0, size, %error, "pager.not_collapsed"),
        }
    }
}
