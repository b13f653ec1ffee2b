//! A userfaultfd of another address space, through a copy of its descriptor. ioctl_userfaultfd(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`.
pub const IOC_NEW: u64 = 0xAA00;
const API: u64 = 0xAA;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
const MODE_MISSING: u64 = 1;

fn ioctl<const N: usize>(uffd: BorrowedFd, request: u64, argument: &mut [u64; N]) -> io::Result<()> {
    // SAFETY: each request's struct is N 64-bit words, as the callers lay out; the kernel writes at most N.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), request, argument.as_mut_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Enables features, once for a descriptor; returns all that the kernel has.
///
/// # Errors
/// `EINVAL`: the kernel lacks one; it may then be called again.
pub fn enable(uffd: BorrowedFd, features: u64) -> io::Result<u64> {
    let mut api = [API, features, 0];
    ioctl(uffd, UFFDIO_API, &mut api)?;
    Ok(api[1])
}

/// Registers a range for missing faults; returns the bits of the ioctls that it allows.
///
/// # Errors
/// `EINVAL`: a kind of memory that cannot be registered. `EBUSY`: another userfaultfd has it.
pub fn register(uffd: BorrowedFd, start: u64, size: u64) -> io::Result<u64> {
    let mut register = [start, size, MODE_MISSING, 0];
    ioctl(uffd, UFFDIO_REGISTER, &mut register)?;
    Ok(register[3])
}

/// Takes a range back: threads that wait there continue.
///
/// # Errors
/// What the kernel said.
pub fn unregister(uffd: BorrowedFd, start: u64, size: u64) -> io::Result<()> {
    ioctl(uffd, UFFDIO_UNREGISTER, &mut [start, size])
}
